"""Documents -> rows of tokens with their boundaries -> what the model and the loss consume."""

from dataclasses import dataclass

import numpy as np
import torch

from mamba3_train.data.token_shards import TokenSplit

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Rows:
    """Rows of L inputs, each with one more token for the last target.

    tokens: (rows, L + 1) unsigned integers.
    boundary_rows, boundary_columns: (n,) where a document, or padding, begins inside a row; columns in [1, L].
    filled: (rows,) inputs before the padding; None when there is none.
    """

    tokens: np.ndarray
    boundary_rows: np.ndarray
    boundary_columns: np.ndarray
    filled: np.ndarray | None = None


class CutRows:
    """Rows cut from the documents laid end to end, so that every token is a target exactly once.

    Args:
        split: the documents.
        sequence_length: inputs in a row.
        by_shard: let every row lie in one shard; what remains of a shard, less than a row, is left out.
    """

    def __init__(self, split: TokenSplit, sequence_length: int, by_shard: bool = False):
        self.split = split
        self.sequence_length = sequence_length
        ends = [shard.tokens for shard in split.shards] if by_shard else [split.tokens]
        self._token_starts = split.starts if by_shard else np.array([0, split.tokens])
        self.row_starts = np.cumsum([0, *(max(0, (tokens - 1) // sequence_length) for tokens in ends)])
        self.count = int(self.row_starts[-1])

    def read(self, rows: np.ndarray) -> Rows:
        """Read rows by number, each in [0, count)."""
        numbers = np.searchsorted(self.row_starts, rows, side="right") - 1
        starts = self._token_starts[numbers] + (rows - self.row_starts[numbers]) * self.sequence_length
        return Rows(*self.split.read(starts, self.sequence_length + 1))


def scatter(parts: list[tuple[np.ndarray, Rows]], count: int) -> Rows:
    """Put rows from several sources into one batch; each part says which of the `count` places its rows take."""
    if len(parts) == 1:
        return parts[0][1]
    first = parts[0][1].tokens
    tokens = np.empty((count, first.shape[1]), dtype=first.dtype)
    for places, rows in parts:
        tokens[places] = rows.tokens
    boundary_rows = np.concatenate([places[rows.boundary_rows] for places, rows in parts])
    boundary_columns = np.concatenate([rows.boundary_columns for _, rows in parts])
    filled = None
    if any(rows.filled is not None for _, rows in parts):
        filled = np.empty(count, dtype=np.int64)
        for places, rows in parts:
            filled[places] = rows.filled
    return Rows(tokens, boundary_rows, boundary_columns, filled)


# What a mark says of its token: it opens a document (or padding); it is padding, so no target.
OPENS, PADDING = 1, 2


def pack(rows: Rows) -> dict[str, torch.Tensor]:
    """Build what a loader hands over, 3 or 5 bytes a token; `unpack` makes of it what a model takes, on its device.

    Returns:
        tokens: (rows, L + 1) int16 or int32, the bits of the stored unsigned type.
        marks: (rows, L + 1) uint8, see above.
    """
    marks = np.zeros(rows.tokens.shape, dtype=np.uint8)
    marks[rows.boundary_rows, rows.boundary_columns] = OPENS
    if rows.filled is not None:
        marks[np.arange(marks.shape[1]) > rows.filled[:, None]] |= PADDING
    signed = np.int16 if rows.tokens.dtype.itemsize == 2 else np.int32
    return {"tokens": torch.from_numpy(rows.tokens.view(signed)), "marks": torch.from_numpy(marks)}


def unpack(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Make a model's batch of a packed one, on the device it lies on.

    Returns:
        input_ids: (rows, L) int64.
        labels: (rows, L) int64, the next token, or -100 where that token opens another document or is padding.
        document_ids: (rows, L) int32, 0 at the start of a row and one more at every document that begins in it; the
            model restarts its state wherever the number changes.
    """
    tokens, marks = batch["tokens"].long(), batch["marks"]
    if batch["tokens"].dtype == torch.int16:
        tokens &= 0xFFFF
    return {
        "input_ids": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].masked_fill(marks[:, 1:] != 0, IGNORED_LABEL),
        "document_ids": (marks[:, :-1] & OPENS).cumsum(dim=1, dtype=torch.int32),
    }
