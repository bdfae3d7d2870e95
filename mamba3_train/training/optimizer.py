"""AdamW with its parameter groups decided by name."""

from collections.abc import Sequence

import torch
from torch import nn

from mamba3_train.model.initialization import is_decayed


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups, decayed and not, holding every trainable parameter exactly once."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"name": "decayed", "params": [p for name, p in named if is_decayed(name)], "weight_decay": weight_decay},
        {"name": "not decayed", "params": [p for name, p in named if not is_decayed(name)], "weight_decay": 0.0},
    ]


def adamw(model: nn.Module, *, lr: float, betas: Sequence[float], eps: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over a model's parameter groups, fused: only that kind can be told on the device to leave a step out."""
    return torch.optim.AdamW(
        parameter_groups(model, weight_decay),
        lr=lr,
        betas=tuple(betas),
        eps=eps,
        fused=True,
    )
