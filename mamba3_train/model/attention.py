"""Causal grouped-query attention: torch's scaled_dot_product_attention, or by blocks where documents are packed."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba3_train.model.config import AttentionConfig
from mamba3_train.model.document_attention import BLOCK, DocumentBlocks, attend_within_documents, document_blocks


class AttentionState(NamedTuple):
    """Keys and values of all tokens so far, (batch, kv_heads, tokens, head_dim), keys already rotated.

    visible: (batch, tokens) bool, whether a token belongs to its row's last document, which alone goes on.
    """

    key: Tensor
    value: Tensor
    visible: Tensor

    def with_room(self, tokens: int) -> "KeyValueCache":
        """The same in buffers that have room for so many tokens more."""
        used = torch.full((1,), self.key.shape[2], device=self.key.device)
        key, value = (F.pad(tensor, (0, 0, 0, tokens)) for tensor in (self.key, self.value))
        return KeyValueCache(key, value, F.pad(self.visible, (0, tokens)), used)


class KeyValueCache(NamedTuple):
    """An `AttentionState` in buffers of fixed size, into which a token is written in place: for decoding.

    visible: (batch, capacity) bool, False where nothing is yet. used: (1,) int64, places filled, on the device.
    """

    key: Tensor
    value: Tensor
    visible: Tensor
    used: Tensor


class AttentionContext(NamedTuple):
    """What all attention layers of a pass share. Made outside of them: a compiler would make it anew for every number.

    turn: cosine and sine of the angles of each position, (seqlen, head_dim / 2); None without rotary positions.
    blocks: of packed documents, for compiled layers on a GPU; None elsewhere.
    """

    turn: tuple[Tensor, Tensor] | None
    blocks: DocumentBlocks | None


def attention_context(
    config: AttentionConfig,
    seqlen: int,
    document_ids: Tensor | None,
    state: AttentionState | KeyValueCache | None,
    dtype: torch.dtype,
    device: torch.device,
) -> AttentionContext:
    """The context of a pass over (batch, seqlen) tokens behind a state; dtype: of the angles, float32 or wider."""
    turn = None
    if config.rotary:
        half = config.head_dim // 2
        frequency = config.rope_theta ** (-torch.arange(half, device=device, dtype=dtype) / half)
        position = torch.arange(seqlen, device=device, dtype=dtype) + _tokens_before(state)
        angle = position.unsqueeze(-1) * frequency
        turn = angle.cos(), angle.sin()
    packed = document_ids is not None and document_ids.is_cuda and state is None
    by_blocks = packed and seqlen >= BLOCK and config.head_dim >= 16  # what FlexAttention takes
    return AttentionContext(turn, document_blocks(document_ids) if by_blocks else None)


class Attention(nn.Module):
    """Grouped-query attention over a row's own document; no positions unless `config.rotary`."""

    def __init__(self, d_model: int, config: AttentionConfig):
        super().__init__()
        self.config = config
        self.by_blocks = True  # where blocks are given
        self.qkv_proj = nn.Linear(d_model, (config.n_heads + 2 * config.n_kv_heads) * config.head_dim, bias=False)
        self.out_proj = nn.Linear(config.n_heads * config.head_dim, d_model, bias=False)

    def forward(
        self,
        u: Tensor,
        document_ids: Tensor | None = None,
        state: AttentionState | KeyValueCache | None = None,
        return_state: bool = False,
        *,
        context: AttentionContext,
    ) -> Tensor | tuple[Tensor, AttentionState | KeyValueCache]:
        """(batch, seqlen, d_model) → the same shape. A state continues each row's first document.

        A `KeyValueCache` takes one token, changes, and is returned itself; it must have room for it. context: of the
        same tokens and state.
        """
        config = self.config
        heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads)
        q, k, v = self.qkv_proj(u).unflatten(-1, (-1, config.head_dim)).transpose(1, 2).split(heads, dim=1)
        if config.rotary:
            q, k = (rotate_positions(vectors, *context.turn) for vectors in (q, k))
        new_state = None
        if isinstance(state, KeyValueCache):
            new_state = _append(state, k, v)
        elif state is not None or return_state:
            new_state = _extended(state, k, v, document_ids)
        if context.blocks is not None and self.by_blocks and torch.compiler.is_compiling():
            y = attend_within_documents(q, k, v, document_ids, context.blocks)
        else:
            y = _attend(q, k, v, document_ids, state, new_state)
        out = self.out_proj(y.transpose(1, 2).flatten(-2))
        return (out, new_state) if return_state else out


def _attend(q, k, v, document_ids, state, new_state) -> Tensor:
    """Attention to a state's keys and values and to k and v, through a mask where causality alone does not decide."""
    mask = None
    if isinstance(state, KeyValueCache):
        mask = state.visible[:, None, None]
    elif document_ids is not None or state is not None:
        mask = _visible(document_ids, q.shape[2], state, q.device)
    if state is not None:
        k, v = new_state.key, new_state.value
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)


def rotate_positions(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on (batch, heads, seqlen, head_dim), halves paired, by the turn of an `AttentionContext`."""
    first, second = vectors.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(vectors.dtype)


def _tokens_before(state: AttentionState | KeyValueCache | None) -> int | Tensor:
    if state is None:
        return 0
    return state.used if isinstance(state, KeyValueCache) else state.key.shape[2]


def _append(cache: KeyValueCache, k: Tensor, v: Tensor) -> KeyValueCache:
    """Write one token into the cache."""
    if k.shape[2] != 1:
        raise ValueError(f"a KeyValueCache takes one token at a time, got {k.shape[2]}")
    cache.key.index_copy_(2, cache.used, k.to(cache.key.dtype))
    cache.value.index_copy_(2, cache.used, v.to(cache.value.dtype))
    cache.visible.index_fill_(1, cache.used, True)
    cache.used.add_(1)
    return cache


def _extended(state: AttentionState | None, k: Tensor, v: Tensor, document_ids: Tensor | None) -> AttentionState:
    """All keys and values, of before and of now, and which of them the last token of each row may see."""
    batch, _, seqlen, _ = k.shape
    visible = torch.ones(batch, seqlen, dtype=torch.bool, device=k.device)
    if document_ids is not None:
        visible = document_ids == document_ids[:, -1:]
    if state is None:
        return AttentionState(k, v, visible)
    # What came before a row belongs to its first document.
    before = state.visible & visible[:, :1]
    return AttentionState(
        torch.cat([state.key, k], dim=2), torch.cat([state.value, v], dim=2), torch.cat([before, visible], dim=1)
    )


def _visible(document_ids: Tensor | None, seqlen: int, state: AttentionState | None, device) -> Tensor:
    """Which keys, of before and of now, each query sees: (batch or 1, 1, seqlen, keys) bool."""
    visible = torch.ones(seqlen, seqlen, dtype=torch.bool, device=device).tril().unsqueeze(0)
    if document_ids is not None:
        visible = visible & (document_ids.unsqueeze(2) == document_ids.unsqueeze(1))
    if state is not None:
        before = state.visible.unsqueeze(1).expand(-1, seqlen, -1)
        if document_ids is not None:
            before = before & (document_ids == document_ids[:, :1]).unsqueeze(2)
        visible = torch.cat([before, visible.expand(len(before), -1, -1)], dim=2)
    return visible.unsqueeze(1)
