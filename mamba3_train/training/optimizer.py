"""AdamW with its parameter groups decided by name, large parameters stepped by a kernel of ours."""

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mamba3_train.errors import UserError
from mamba3_train.model.initialization import is_decayed

LARGE = 2**21
"""Numbers of a parameter from which a launch of its own is worth it."""


class AdamW(torch.optim.AdamW):
    """PyTorch's, always fused, with the same state; on a GPU large float32 parameters go by `kernels.adamw`.

    PyTorch's kernel writes the gradients back, too, that it divides by `grad_scale`, an eighth of all it moves.
    """

    def __init__(self, params, **settings):
        super().__init__(params, fused=True, **settings)

    @torch.no_grad()
    def step(self, closure=None):
        """As PyTorch's, which takes the parameters that are left; `grad_scale` and `found_inf` as it reads them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        set_aside = [(p, p.grad) for group in self.param_groups for p in self._step_large(group)]
        for p, _ in set_aside:
            p.grad = None
        super().step()
        for p, gradient in set_aside:
            p.grad = gradient
        return loss

    def _step_large(self, group: dict) -> list[Tensor]:
        """Step a group's large parameters and return them."""
        large = [p for p in group["params"] if _is_large(p)]
        if not large:
            return []
        from mamba3_train.kernels.adamw import adamw_in_place

        one = torch.ones((), device=_local(large[0]).device)
        skip, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        skip, scale = 0 * one if skip is None else skip, one if scale is None else scale
        states = [self._state_of(p) for p in large]
        torch._foreach_add_([state["step"] for state in states], 1 - skip)
        # In float64: 1 − β₂ is a small difference at first.
        steps = torch.stack([state["step"] for state in states]).double()
        corrections = torch.stack([1 - beta**steps for beta in group["betas"]], dim=1).float()
        settings = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        for p, state, correction in zip(large, states, corrections, strict=True):
            tensors = (_local(t) for t in (p, p.grad, state["exp_avg"], state["exp_avg_sq"]))
            adamw_in_place(*tensors, correction, skip, scale, **settings)
        return large

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        """What PyTorch keeps of a parameter, made at its first step."""
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        return state


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _is_large(p: Tensor) -> bool:
    """Whether a kernel of ours steps a parameter: one that rests on a GPU, or where kernels are interpreted."""
    if p.grad is None or not (p.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return False
    p, gradient = _local(p), _local(p.grad)
    return (
        p.numel() >= LARGE
        and p.dtype == gradient.dtype == torch.float32
        and p.is_contiguous()
        and gradient.is_contiguous()
    )


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups, decayed and not, holding every trainable parameter exactly once."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"name": "decayed", "params": [p for name, p in named if is_decayed(name)], "weight_decay": weight_decay},
        {"name": "not decayed", "params": [p for name, p in named if not is_decayed(name)], "weight_decay": 0.0},
    ]


def adamw(model: nn.Module, *, lr: float, betas: Sequence[float], eps: float, weight_decay: float) -> AdamW:
    """AdamW over a model's parameter groups, fused: only that kind can be told on the device to leave a step out.

    Raises:
        UserError: a setting out of its range.
    """
    numbers = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
    wrong = [key for key, value in numbers.items() if not (_is_number(value) and 0 <= value < math.inf)]
    if wrong:
        raise UserError(f"optimizer.{wrong[0]}={numbers[wrong[0]]} must be a number, at least 0")
    if len(betas) != 2 or not all(_is_number(beta) and 0 <= beta < 1 for beta in betas):
        raise UserError(f"optimizer.betas={list(betas)} must be two numbers, at least 0 and below 1")
    return AdamW(parameter_groups(model, weight_decay), lr=lr, betas=tuple(betas), eps=eps)
