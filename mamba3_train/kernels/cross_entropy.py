"""Cross-entropy of rows of logits, which become their own gradient."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


def cross_entropy_in_place(logits: Tensor, labels: Tensor, ignore_index: int, gradient: bool) -> Tensor:
    """−log softmax(logits)[label] of every row, (rows,) float32, 0 where the label is ignore_index.

    Args:
        logits: (rows, vocabulary), contiguous; with `gradient` overwritten by softmax − onehot, 0 where ignored.
        labels: (rows,) int64.

    Raises:
        ValueError: logits that are not contiguous.
    """
    if not logits.is_contiguous():
        raise ValueError(f"logits must be contiguous, got strides {logits.stride()}")
    rows, vocabulary = logits.shape
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        block = min(BLOCK, triton.next_power_of_2(vocabulary))
        cross_entropy_kernel[(rows,)](
            logits, labels.contiguous(), loss, vocabulary, ignore_index, GRADIENT=gradient, BLOCK=block, num_warps=8
        )
    return loss


@triton.jit
def cross_entropy_kernel(
    logits, labels, loss, vocabulary, ignore_index, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One row a program: once through it for the largest logit and the sum of exponentials, once more to write."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    label = tl.load(labels + row)
    columns = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        inside = start + columns < vocabulary
        x = tl.load(logits + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        new = tl.maximum(largest, x)
        # A column that has seen nothing yet has −∞ on both sides, whose difference would be no number.
        total = tl.where(inside, total * tl.exp(largest - new) + tl.exp(x - new), total)
        largest = new
    most = tl.max(largest, axis=0)
    log_sum = most + tl.log(tl.sum(total * tl.exp(largest - most), axis=0))
    counts = label != ignore_index
    at_label = tl.load(logits + tl.where(counts, label, 0)).to(tl.float32)
    tl.store(loss + row, tl.where(counts, log_sum - at_label, 0.0))
    if GRADIENT:
        # Every thread must have read its logits before another overwrites them.
        tl.debug_barrier()
        for start in range(0, vocabulary, BLOCK):
            inside = start + columns < vocabulary
            x = tl.load(logits + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
            d = tl.exp(x - log_sum) - tl.where(start + columns == label, 1.0, 0.0)
            tl.store(logits + start + columns, tl.where(counts, d, 0.0).to(logits.dtype.element_ty), mask=inside)
