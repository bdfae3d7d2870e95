"""torch.compile, layer by layer: what lies between the matrix products and the scan becomes a few fused kernels."""

import torch
from torch import nn


def compile_layers(model: nn.Module, backend: str = "inductor") -> None:
    """Compile every layer's forward and backward, in place; layers of one kind share one graph.

    Comes after the choice of what is recomputed, which the compiler must see, and before sharding, whose hooks it must
    not. Names and parameters stay as they are: only the layers' `forward` is replaced.
    """
    # Under DDP graphs would be cut where a bucket of gradients is full, so that in whole models communication begins
    # early. Layers are small enough for that, and what is cut apart keeps more for the backward.
    torch._dynamo.config.optimize_ddp = False
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward, dynamic=False, backend=backend)
