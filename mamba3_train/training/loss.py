"""What training counts: the loss of the next token, and its targets."""

from torch import Tensor

from mamba3_train.kernels.linear_cross_entropy import IGNORED_LABEL, next_token_loss

__all__ = ["IGNORED_LABEL", "count_targets", "next_token_loss"]


def count_targets(labels: Tensor) -> Tensor:
    """Number of labels that count, on the labels' device."""
    return (labels != IGNORED_LABEL).sum()
