"""The language-model head and its loss in one: no logits of all tokens are ever in memory, and none in float32.

The gradient follows from the logits at once, so it is computed in the forward pass: rows by blocks, each block's logits
are turned into their gradient in place and multiplied out. The backward pass only scales.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED_LABEL = -100
# Rows of logits in memory at a time: 2 GiB of them at a vocabulary of 128,256 in 16 bit.
ROWS = 8192


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of −log p(label) over the labels that count, in float32 or wider.

    Args:
        logits: (…, vocabulary).
        labels: (…) int64; IGNORED_LABEL where there is no target.
    """
    logits = logits.flatten(0, -2)
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, backend: str = "auto") -> Tensor:
    """`next_token_loss(hidden · weightᵀ, labels)`.

    Args:
        hidden: (…, d_model).
        weight: (vocabulary, d_model).
        labels: (…) int64; IGNORED_LABEL where there is no target.
        backend: `triton`; `reference` or anything else is plain PyTorch; `auto` is triton on a CUDA device.

    Under autocast the products are in its dtype, as those of a linear layer are.
    """
    if backend == "triton" or (backend == "auto" and hidden.is_cuda):
        return _Fused.apply(hidden.flatten(0, -2), weight, labels.flatten())
    return next_token_loss(F.linear(hidden, weight), labels)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels):
        from mamba3_train.kernels.cross_entropy import cross_entropy_in_place

        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        ctx.dtypes = hidden.dtype, weight.dtype
        with torch.autocast(kind, enabled=False):
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
            d_hidden = torch.empty_like(hidden) if wanted else None
            d_weight = None
            loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
            for rows, targets, place in zip(
                hidden.split(ROWS), labels.split(ROWS), d_hidden.split(ROWS) if wanted else _nothing(), strict=False
            ):
                logits = rows @ weight.T
                loss += cross_entropy_in_place(logits, targets, IGNORED_LABEL, wanted).sum()
                if wanted:
                    torch.mm(logits, weight, out=place)
                    # Nothing else holds a block's share: the next block's logits take its place.
                    d_weight = _added(d_weight, _product(logits.T, rows))
        if wanted:
            ctx.save_for_backward(d_hidden, d_weight)
        return loss

    @staticmethod
    def backward(ctx, d_loss):
        d_hidden, d_weight = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        return (d_hidden * d_loss).to(hidden_dtype), (d_weight * d_loss).to(weight_dtype), None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a · b, accumulated and returned in float32."""
    if a.is_cuda and a.dtype.itemsize < 4:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _added(total: Tensor | None, share: Tensor) -> Tensor:
    return share if total is None else total.add_(share)


def _nothing():
    while True:
        yield None
