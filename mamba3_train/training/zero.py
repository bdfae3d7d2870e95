"""DeepSpeed's ZeRO as a strategy: its engine shards, exchanges and steps; parameters stay float32.

Lightning's own DeepSpeedStrategy runs on CUDA alone, turns bf16-mixed into the engine's `bf16` section, which casts
every parameter, and saves in the engine's own format. So the engine is driven here, with its `torch_autocast` section,
and its state goes into the same checkpoints as everybody's.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from mamba3_train.errors import UserError

# Modules whose weights and gradients may travel in the autocast dtype, which casts them anyway. Everything else, the
# dynamics and the norms above all, travels in float32.
MATRIX_MODULES = ("torch.nn.Linear", "mamba3_train.model.layers.Unembedding")


class ZeRO(DDPStrategy):
    """ZeRO stage 1 (optimizer state in shards), 2 (gradients too) or 3 (parameters too).

    Args:
        backend: of torch.distributed.
        stage: 1, 2 or 3.
        gradient_clip_norm: largest norm of the whole gradient; the engine clips as it steps.

    Raises:
        UserError: deepspeed is not installed, or there is no such stage.
    """

    def __init__(self, backend: str, stage: int, gradient_clip_norm: float):
        super().__init__(cluster_environment=TorchElasticEnvironment(), process_group_backend=backend)
        if stage not in (1, 2, 3):
            raise UserError(f"strategy.stage={stage} must be 1, 2 or 3")
        self.stage, self.gradient_clip_norm = stage, gradient_clip_norm
        self.deepspeed = _import_deepspeed("cpu" if backend == "gloo" else "cuda")
        self.engine = None

    def engine_config(self) -> dict:
        """The engine's settings. Accumulation is decided micro-batch by micro-batch, so its own counters stay at 1."""
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.gradient_clip_norm,
            "zero_optimization": {"stage": self.stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
        }
        if self.precision_plugin.precision == "bf16-mixed":
            config["torch_autocast"] = {
                "enabled": True,
                "dtype": "bfloat16",
                "lower_precision_safe_modules": list(MATRIX_MODULES),
            }
        return config

    def construction(self) -> AbstractContextManager:
        """Where the model is built: on meta, or for stage 3 each module cut into shards as soon as it is made."""
        if self.stage < 3:
            return torch.device("meta")
        return self.deepspeed.zero.Init(config_dict_or_path=self.engine_config())

    def configure_ddp(self) -> None:
        """Nothing to wrap: the engine exchanges gradients."""

    def setup(self, trainer) -> None:
        """Hand model and optimizer over to the engine."""
        super().setup(trainer)
        if self.engine is None:
            self.engine, optimizer, _, _ = self.deepspeed.initialize(
                model=self.lightning_module.model,
                optimizer=self.optimizers[0],
                config=self.engine_config(),
                dist_init_required=False,
            )
            self._create_state(optimizer)
            self.optimizers = [optimizer]

    def backward(self, closure_loss: Tensor, *args, **kwargs) -> None:
        """The engine's backward pass."""
        self.engine.backward(closure_loss, scale_wrt_gas=False)

    def optimizer_step(self, optimizer, closure, model=None, **kwargs) -> None:
        """The engine's step, which clips, updates and forgets the gradients, with Lightning's hooks before it."""
        super().optimizer_step(_EngineStep(self.engine), closure, model, **kwargs)

    def teardown(self) -> None:
        """Leave the shards where they are: Lightning would move parameters and optimizer state off the device."""
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()

    def gradient_norm(self) -> Tensor:
        """Norm of the whole gradient in the last step, before clipping; infinite where the engine skipped the step."""
        return torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=self.root_device)

    def parts(self) -> list[Tensor]:
        """All parameters as the optimizer sees them: flat, in shards, with zeros at the end."""
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        return [DTensor.from_local(flat.detach(), mesh, [Shard(0)]) for flat in self._flat_parameters]

    def tensors(self) -> dict[str, Tensor]:
        """Weights and optimizer state by the names of a checkpoint, as shards along the first dimension.

        One whole tensor at a time is gathered on each rank.
        """
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        steps = self.inner_optimizer.state[self._flat_parameters[0]]["step"]
        found = {}
        for name, parameter in self.engine.module.named_parameters():
            for label, key in _labels(name):
                whole = self._whole(parameter, key)
                shard = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
                found[label] = DTensor.from_local(
                    shard.to_local().clone(),
                    mesh,
                    [Shard(0)],
                    run_check=False,
                    shape=whole.shape,
                    stride=whole.stride(),
                )
            found[f"optimizer.{name}.step"] = steps.clone()
        return found

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        for name, parameter in self.engine.module.named_parameters():
            for label, key in _labels(name):
                self._set_whole(parameter, key, tensors[label].full_tensor())
        for flat in self._flat_parameters:
            self.inner_optimizer.state[flat]["step"].copy_(tensors[f"optimizer.{name}.step"])

    @property
    def inner_optimizer(self) -> torch.optim.Optimizer:
        """The one that the engine steps."""
        return self.engine.optimizer.optimizer

    @property
    def _flat_parameters(self) -> list[Tensor]:
        """What the inner optimizer really updates: this rank's part of all parameters of a group, end to end."""
        optimizer = self.engine.optimizer
        return optimizer.fp32_partitioned_groups_flat if self.stage == 3 else optimizer.single_partition_of_fp32_groups

    def _create_state(self, optimizer) -> None:
        """Give AdamW its state before the first step: to load into, and because DeepSpeed links parameters to state
        after the first group's step and would miss the groups after it."""
        for flat in self._flat_parameters:
            optimizer.optimizer.state[flat] = {
                "step": torch.zeros((), device=self.root_device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        if self.stage < 3:
            optimizer._lazy_init_hp_params_optimizer_state()

    def _whole(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        """A parameter (key None) or its optimizer state, gathered."""
        if key is None:
            return self.deepspeed.utils.safe_get_full_fp32_param(parameter)
        return self.deepspeed.utils.safe_get_full_optimizer_state(parameter, key)

    def _set_whole(self, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
        utils = self.deepspeed.utils
        if self.stage < 3:
            if key is None:
                utils.safe_set_full_fp32_param(parameter, value)
                parameter.data.copy_(value)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, key)
            return
        # This rank's part, the last one padded: the engine's own setter of whole values takes no padding.
        size = parameter.ds_tensor.numel()
        padded = value.new_zeros(size * self.world_size)
        padded[: value.numel()] = value.flatten()
        part = padded[size * self.global_rank : size * (self.global_rank + 1)]
        if key is None:
            utils.safe_set_local_fp32_param(parameter, part)
            parameter.ds_tensor.data.copy_(part)
        else:
            utils.safe_set_local_optimizer_state(parameter, part, key)


class _EngineStep:
    """An engine as Lightning's precision plugins expect an optimizer."""

    def __init__(self, engine):
        self.engine = engine

    def step(self, closure) -> None:
        closure()
        self.engine.step()


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of a parameter, also of one that stage 3 has cut up."""
    return getattr(parameter, "ds_shape", parameter.shape)


def assign_partitioned(parameter: nn.Parameter, value: Tensor) -> None:
    """Copy rank 0's whole value into a parameter that stage 3 has cut up."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter], modifier_rank=0):
        if dist.get_rank() == 0:
            parameter.data.copy_(value)


def _labels(name: str) -> Iterator[tuple[str, str | None]]:
    """Names in a checkpoint of a parameter's value and of its optimizer state, each with the optimizer's key."""
    yield f"model.{name}", None
    for key in ("exp_avg", "exp_avg_sq"):
        yield f"optimizer.{name}.{key}", key


def _import_deepspeed(accelerator: str):
    # Read when deepspeed is imported; it would take a GPU wherever there is one.
    os.environ["DS_ACCELERATOR"] = accelerator
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"strategy=deepspeed_zero… needs deepspeed ({error}): pip install 'mamba3-train[deepspeed]', "
            "or choose strategy=fsdp"
        ) from error
    if accelerator == "cpu":
        # An all-reduce through shared memory, which a C++ compiler would build for a minute first; gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed
