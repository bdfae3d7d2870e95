"""torch.compile, layer by layer: what lies between the matrix products and the scan becomes a few fused kernels."""

import torch
from torch import nn


def compile_layers(model: nn.Module, backend: str = "inductor") -> None:
    """Compile every layer's forward and backward, in place; layers of one kind share one graph.

    Comes after the choice of what is recomputed, which the compiler must see, and before sharding, whose hooks it must
    not. Names and parameters stay as they are: only the layers' `forward` is replaced.
    """
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward, dynamic=False, backend=backend)
