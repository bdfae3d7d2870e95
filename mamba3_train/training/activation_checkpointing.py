"""Trading time for memory: what a block computes in the forward pass is computed again in the backward pass."""

import functools

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mamba3_train.errors import UserError
from mamba3_train.model.attention import Attention

CHOICES = ("none", "selective", "full")

# What `selective` keeps: results that cost much to compute for their size. Everything elementwise is computed again.
EXPENSIVE = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "mamba3_train::scan",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
    }
)


def check_choice(choice: str) -> str:
    """The choice, if it is one.

    Raises:
        UserError: it is not.
    """
    if choice not in CHOICES:
        raise UserError(f"trainer.activation_checkpointing={choice} must be one of {', '.join(CHOICES)}")
    return choice


def recompute_activations(model: nn.Module, choice: str) -> None:
    """Make every layer of a model keep its input alone (`full`), that and its matrix products, scan and attention
    (`selective`), or everything (`none`), in place.

    The layers' names and parameters stay as they are: only their `forward` is replaced. Attention goes through a mask:
    compiled and recomputed, FlexAttention gave wrong results on a GPU (torch 2.11).
    """
    if check_choice(choice) == "none":
        return
    for module in model.modules():
        if isinstance(module, Attention):
            module.by_blocks = False
    settings = {"use_reentrant": False}
    if choice == "selective":
        settings["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_expensive)
    for layer in model.layers:
        layer.forward = functools.partial(checkpoint, layer.forward, **settings)


def _keep_expensive(context, operator: torch._ops.OpOverload, *args, **kwargs) -> CheckpointPolicy:
    name = operator.name().partition(".")[0]
    return CheckpointPolicy.MUST_SAVE if name in EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE
