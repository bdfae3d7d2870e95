"""Norms of parameters and of their updates, and of each layer's gradient on demand, for the rows that are logged."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from mamba3_train.errors import UserError
from mamba3_train.training.strategies import parameter_parts, total_norm
from mamba3_train.training.zero import ZeRO


class Norms(Callback):
    """Measures the steps that are logged and leaves the others alone; of shards, too, it gives the norm of the whole.

    For the update it keeps a copy of this rank's parameters during the optimizer's step, when activations are gone.

    Args:
        every_n_steps: steps between rows.
        of_layers: also the gradient's norm of every layer, before clipping.
    """

    def __init__(self, *, every_n_steps: int, of_layers: bool):
        self.every_n_steps, self.of_layers = every_n_steps, of_layers
        self._before: list[Tensor] | None = None
        self._layers: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Refuse what cannot be measured.

        Raises:
            UserError: gradients of layers under ZeRO, whose engine keeps them in flat pieces of no layer's own.
        """
        if self.of_layers and isinstance(trainer.strategy, ZeRO):
            raise UserError("trainer.log_layer_norms=true does not work with DeepSpeed: choose strategy=fsdp or ddp")

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer) -> None:
        """Keep what the step will change, if it is logged."""
        step = trainer.global_step + 1
        if step % self.every_n_steps and step != trainer.max_steps:
            return
        self._before = [parameter.clone() for parameter in parameter_parts(trainer.strategy, module.model)]
        if self.of_layers:
            self._layers = layer_gradient_norms(module.model)

    def take(self, module: LightningModule) -> dict[str, Tensor]:
        """The norms of the step that is over, on the device: `train/param_norm`, `train/update_norm`, of layers."""
        if self._before is None:
            return {}
        now = parameter_parts(module.trainer.strategy, module.model)
        torch._foreach_sub_(self._before, now)
        values = {"train/param_norm": total_norm(now), "train/update_norm": total_norm(self._before)}
        values |= {f"train/grad_norm/{name}": norm for name, norm in self._layers.items()}
        self._before, self._layers = None, {}
        return values


def layer_gradient_norms(model: nn.Module) -> dict[str, Tensor]:
    """Norm of the gradient of `layers.0`, `layers.1`, …, and of every other module at the root, by name."""
    gradients: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            first, second, *_ = *name.split("."), ""
            gradients.setdefault(f"{first}.{second}" if first == "layers" else first, []).append(parameter.grad)
    return {name: total_norm(tensors) for name, tensors in gradients.items()}
