"""Trading time for memory: what a block computes in the forward pass is computed again in the backward pass."""

import functools

from torch import nn
from torch.utils.checkpoint import checkpoint

from mamba3_train.errors import UserError

CHOICES = ("none", "full")


def check_choice(choice: str) -> str:
    """The choice, if it is one.

    Raises:
        UserError: it is not.
    """
    if choice not in CHOICES:
        raise UserError(f"trainer.activation_checkpointing={choice} must be one of {', '.join(CHOICES)}")
    return choice


def recompute_activations(model: nn.Module, choice: str) -> None:
    """Make every layer of a model keep its input alone (`full`), or everything (`none`), in place.

    The layers' names and parameters stay as they are: only their `forward` is replaced.
    """
    if check_choice(choice) == "full":
        for layer in model.layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
