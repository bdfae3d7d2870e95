"""A model and its optimizer as tensors by name, the same whatever shards or wraps them, and back."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_model_state_dict, set_state_dict

from mamba3_train.checkpoint import sharded


def training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """`model.<name>` and `optimizer.<name>.<state>`; an optimizer that has not stepped yet gets its state first."""
    if optimizer is None:
        return {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    model_state, optimizer_state = get_state_dict(model, optimizer)
    tensors = {f"model.{name}": tensor for name, tensor in model_state.items()}
    for name, states in optimizer_state["state"].items():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in states.items()}
    return tensors


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Fill a model, and an optimizer, from a checkpoint.

    Raises:
        UserError: the checkpoint lacks a parameter, or has it in another shape.
    """
    tensors = training_tensors(model, optimizer)
    sharded.load(folder, tensors)
    model_state = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    if optimizer is None:
        set_model_state_dict(model, model_state)
        return
    _, optimizer_state = get_state_dict(model, optimizer)
    for name, states in optimizer_state["state"].items():
        for key in states:
            states[key] = tensors[f"optimizer.{name}.{key}"]
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
