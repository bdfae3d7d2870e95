"""One AdamW step of a large parameter, its gradient divided as it is read: 28 bytes a number cross memory, no more."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def adamw_in_place(
    parameter: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, corrections: Tensor, skip: Tensor,
    scale: Tensor, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """What `torch.optim.AdamW` does to a parameter and its moments, the gradient left as it is.

    Args:
        parameter, gradient, exp_avg, exp_avg_sq: float32, contiguous, of one shape.
        corrections: (2,) float32, 1 − β₁ᵗ and 1 − β₂ᵗ of this step t.
        skip: () float32; 1 leaves everything as it is.
        scale: () float32, by which the gradient is divided.

    Raises:
        ValueError: a tensor that is not contiguous or not float32.
    """
    tensors = {"parameter": parameter, "gradient": gradient, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous float32, got {tensor.dtype}, strides {tensor.stride()}")
    grid = (triton.cdiv(parameter.numel(), BLOCK),)
    adamw_kernel[grid](
        *tensors.values(), corrections, skip, scale, parameter.numel(), lr, *(1 - beta for beta in betas), eps,
        weight_decay, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["lr", "share1", "share2", "eps", "weight_decay"])
def adamw_kernel(
    parameter, gradient, exp_avg, exp_avg_sq, corrections, skip, scale, size, lr, share1, share2, eps,
    weight_decay, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK numbers a program, by 16 bytes where the size is a multiple of 16: that it is specialized for.

    share1, share2: 1 − β₁ and 1 − β₂, not the betas: 1 − 0.999 in float32 is 10⁻⁵ of itself off.
    """
    if tl.load(skip) != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        p = tl.load(parameter + at, mask=inside)
        g = tl.load(gradient + at, mask=inside) / tl.load(scale)
        m = tl.load(exp_avg + at, mask=inside)
        v = tl.load(exp_avg_sq + at, mask=inside)
        m += share1 * (g - m)
        v += share2 * (g * g - v)
        p -= lr * weight_decay * p
        denominator = tl.sqrt(v) / tl.sqrt(tl.load(corrections + 1)) + eps
        p -= lr / tl.load(corrections) * (m / denominator)
        tl.store(parameter + at, p, mask=inside)
        tl.store(exp_avg + at, m, mask=inside)
        tl.store(exp_avg_sq + at, v, mask=inside)
