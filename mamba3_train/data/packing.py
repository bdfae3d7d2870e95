"""Rows of tokens with document boundaries -> what the model and the loss consume."""

import numpy as np
import torch

IGNORED_LABEL = -100


def pack(tokens: np.ndarray, boundary_rows: np.ndarray, boundary_columns: np.ndarray) -> dict[str, torch.Tensor]:
    """Build a batch from rows of `L + 1` tokens.

    Args:
        tokens: (rows, L + 1) unsigned integers.
        boundary_rows, boundary_columns: (n,) where a document begins inside a row; columns in [1, L].

    Returns:
        input_ids: (rows, L) int64.
        labels: (rows, L) int64, the next token, or -100 where that token opens another document.
        document_ids: (rows, L) int32, 0 at the start of a row and one more at every document that begins in it; the
            model restarts its state wherever the number changes.
    """
    rows, width = tokens.shape
    begins = np.zeros((rows, width), dtype=np.int32)
    begins[boundary_rows, boundary_columns] = 1
    labels = tokens[:, 1:].astype(np.int64)
    labels[boundary_rows, boundary_columns - 1] = IGNORED_LABEL
    return {
        "input_ids": torch.from_numpy(tokens[:, :-1].astype(np.int64)),
        "labels": torch.from_numpy(labels),
        "document_ids": torch.from_numpy(np.cumsum(begins[:, :-1], axis=1, dtype=np.int32)),
    }
