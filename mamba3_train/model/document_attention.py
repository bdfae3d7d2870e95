"""Causal attention within documents that passes over the blocks of others: PyTorch's FlexAttention."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128
"""Tokens a side of what is attended to, or passed over, as a whole. For shorter rows FlexAttention has another kernel,
which refuses some of them."""


class DocumentBlocks(NamedTuple):
    """Which blocks of keys a block's queries see in part (the mask tells) and whole, and the other way round.

    Numbers (batch, 1, blocks) and lists (batch, 1, blocks, blocks), int32, of which a block's number counts.
    """

    keys: Tensor
    key_list: Tensor
    whole_keys: Tensor
    whole_key_list: Tensor
    queries: Tensor
    query_list: Tensor
    whole_queries: Tensor
    whole_query_list: Tensor


def attend_within_documents(q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor, blocks: DocumentBlocks) -> Tensor:
    """(batch, heads, seqlen, head_dim), k and v of as many or fewer heads → like q; for compiled layers on a GPU.

    Elsewhere FlexAttention makes all pairs of tokens.
    """

    def visible(batch, head, query, key):
        return (query >= key) & (document_ids[batch, query] == document_ids[batch, key])

    lengths = (q.shape[2], k.shape[2])
    block_mask = BlockMask(lengths, *blocks, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=visible)
    return flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True)


def document_blocks(document_ids: Tensor) -> DocumentBlocks:
    """The blocks of rows with these ids, (batch, seqlen), which never decrease along a row.

    So the first and the last id of each block tell: what is seen in part and what whole are runs of blocks. To be
    called outside compiled code, once for all layers.
    """
    seqlen = document_ids.shape[1]
    begin = torch.arange(0, seqlen, BLOCK, device=document_ids.device)
    first, last = document_ids[:, begin], document_ids[:, (begin + BLOCK - 1).clamp(max=seqlen - 1)]
    here = torch.arange(len(begin), device=document_ids.device)
    # Keys seen by a block's queries: [seen, here], of them [whole, here) without a look at ids or order.
    seen = (last[:, None, :] < first[:, :, None]).sum(-1)
    whole = (first[:, None, :] < last[:, :, None]).sum(-1).minimum(here)
    # Queries that see a block's keys: [here, end), of them (here, partly) all of these.
    end = (first[:, None, :] <= last[:, :, None]).sum(-1)
    partly = (last[:, None, :] <= first[:, :, None]).sum(-1).maximum(here + 1)

    def listed(start, stop, then=here, until=here):
        """Number and list of the blocks from start to stop and, behind them, from `then` to `until`."""
        first, second = stop - start, until - then
        jump = torch.where(here < first[..., None], start[..., None], (then - first)[..., None])
        blocks = (jump + here).clamp(max=len(begin) - 1)
        return (first + second)[:, None].to(torch.int32), blocks[:, None].to(torch.int32)

    return DocumentBlocks(
        *listed(seen, whole, here, here + 1),
        *listed(whole, here),
        *listed(here, here + 1, partly, end),
        *listed(here + 1, partly),
    )
