"""Perplexity and bits per byte of packed rows."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Likelihood:
    """What a model makes of some text.

    nats: cross-entropy of all targets together. targets: tokens that were predicted. bytes: of their text, or None
    where tokens have no bytes of their own.
    """

    nats: float
    targets: int
    bytes: int | None

    @property
    def perplexity(self) -> float:
        """Of a token."""
        return math.exp(self.nats / self.targets)

    @property
    def bits_per_byte(self) -> float | None:
        """Of the text."""
        return self.nats / math.log(2) / self.bytes if self.bytes else None


@torch.no_grad()
def likelihood(
    model: Callable[..., Tensor], batches: Iterable[dict[str, Tensor]], token_bytes: Tensor | None, device: torch.device
) -> Likelihood:
    """Sum over batches, and over ranks where there are several.

    Args:
        model: (input_ids, document_ids, labels=) → the summed cross-entropy of the labels, in nats.
        batches: `input_ids`, `labels` (−100: no target) and `document_ids`, each (rows, tokens).
        token_bytes: (vocabulary,) int64, bytes of every token.
        device: where the model is.
    """
    # nats, targets, bytes; float64 counts integers exactly up to 2**53.
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for batch in batches:
        inputs, labels, documents = (batch[key].to(device) for key in ("input_ids", "labels", "document_ids"))
        targets = labels[labels != IGNORED_LABEL]
        if not len(targets):
            continue
        sums[0] += model(inputs, documents, labels=labels)
        sums[1] += len(targets)
        if token_bytes is not None:
            sums[2] += token_bytes.to(device)[targets].sum()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums)
    nats, targets, size = sums.tolist()
    return Likelihood(nats, int(targets), None if token_bytes is None else int(size))
