"""Long rows in segments: the state goes on from one to the next, gradients do not (truncated backpropagation in time).

All segments of a row are read in one optimizer step, so no state outlives a step: the loss is that of the whole row,
and neither a stop nor another number of ranks changes anything.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mamba3_train.errors import UserError
from mamba3_train.model import Mamba3Config
from mamba3_train.model.recurrent_state import RecurrentState


class Segment(NamedTuple):
    """Some columns of a batch of rows.

    input_ids, labels, document_ids: (rows, columns). continues: (rows,) bool, whether the first document of a row began
    in the segment before; None in the first segment. last: no segment follows.
    """

    input_ids: Tensor
    labels: Tensor
    document_ids: Tensor
    continues: Tensor | None
    last: bool


def check_segments(length: int | None, config: Mamba3Config) -> None:
    """Refuse segments for a model that needs more than a state of fixed size.

    Raises:
        UserError: the model has layers of attention.
    """
    if length is not None and set(config.layers) != {"M"}:
        raise UserError(
            f"data.segment_length={length} carries the state of Mamba-3 layers, but model.layer_pattern="
            f"{config.layer_pattern} has attention, which would need every token before: set data.segment_length=null"
        )


def segments(batch: dict[str, Tensor], length: int | None) -> Iterator[Segment]:
    """Cut a batch into segments of `length` columns, in order; None leaves it whole."""
    columns = batch["input_ids"].shape[1]
    length = length or columns
    documents = batch["document_ids"]
    for begin in range(0, columns, length):
        here = slice(begin, begin + length)
        yield Segment(
            input_ids=batch["input_ids"][:, here],
            labels=batch["labels"][:, here],
            document_ids=documents[:, here],
            continues=documents[:, begin] == documents[:, begin - 1] if begin else None,
            last=begin + length >= columns,
        )


def carried(state: RecurrentState | None, segment: Segment) -> RecurrentState | None:
    """The state that a segment begins with: what the one before left, or zero where a document begins; no gradient."""
    if segment.continues is None:
        return None
    return tuple(type(layer)(*(_keep(tensor.detach(), segment.continues) for tensor in layer)) for layer in state)


def _keep(tensor: Tensor, rows: Tensor) -> Tensor:
    # Not by multiplication: what a document left must not matter, even where it is not finite.
    return torch.where(rows.view(-1, *[1] * (tensor.dim() - 1)), tensor, 0)
