"""Cross-entropy of the next token."""

import torch.nn.functional as F
from torch import Tensor

IGNORED_LABEL = -100


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


def count_targets(labels: Tensor) -> Tensor:
    """Number of labels that count, on the labels' device."""
    return (labels != IGNORED_LABEL).sum()
