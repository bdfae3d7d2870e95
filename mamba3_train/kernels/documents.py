"""Packed documents: several in one row, each with a state of its own."""

import torch
from torch import Tensor


def document_ids_from_lengths(cu_seqlens: Tensor, batch: int, seqlen: int) -> Tensor:
    """Turn cumulative document lengths into one id a token: (batch, seqlen) int32, non-decreasing along a row.

    Args:
        cu_seqlens: (documents + 1,) integers over the batch · seqlen tokens in row order: first 0, last batch · seqlen,
            never decreasing. Every row must start a document; empty documents are allowed, so the tensor may be padded
            to a fixed length by repeating its last entry.

    Raises:
        ValueError: the lengths break these rules. On a GPU tensor only the shape is checked, because reading values
            would wait for the device.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens must be one row of at least two integers, got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        )
    tokens = batch * seqlen
    if cu_seqlens.device.type == "cpu":
        _check_lengths(cu_seqlens, batch, seqlen)
    starts = torch.zeros(tokens + 1, dtype=torch.int32, device=cu_seqlens.device)
    # Empty documents share a start with the next one; both write the same value.
    starts[cu_seqlens[:-1].long()] = 1
    return starts[:tokens].cumsum(0, dtype=torch.int32).view(batch, seqlen)


def check_document_ids(document_ids: Tensor, batch: int, seqlen: int) -> None:
    """Raise ValueError unless document_ids is (batch, seqlen), integer and non-decreasing along rows.

    On the CPU alone and not in a compiled graph: looking at values would wait for the device, or cut the graph.
    """
    if tuple(document_ids.shape) != (batch, seqlen) or document_ids.is_floating_point():
        raise ValueError(
            f"document_ids must be ({batch}, {seqlen}) integers, got {tuple(document_ids.shape)} {document_ids.dtype}"
        )
    visible = document_ids.device.type == "cpu" and not torch.compiler.is_compiling()
    if visible and bool((document_ids.diff(dim=1) < 0).any()):
        raise ValueError("document_ids must not decrease along a row: give each new document a larger id")


def _check_lengths(cu_seqlens: Tensor, batch: int, seqlen: int) -> None:
    tokens = batch * seqlen
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens:
        raise ValueError(
            f"cu_seqlens must run from 0 to batch · seqlen = {tokens}, "
            f"got {int(cu_seqlens[0])} to {int(cu_seqlens[-1])}"
        )
    if bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(f"cu_seqlens must not decrease, got {cu_seqlens.tolist()}")
    missing = set(range(0, tokens, seqlen)) - set(cu_seqlens.tolist())
    if missing:
        raise ValueError(
            f"cu_seqlens must start a document at every row; row(s) {sorted(m // seqlen for m in missing)} "
            f"of {seqlen} tokens start inside one"
        )
