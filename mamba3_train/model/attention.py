"""Causal grouped-query attention through torch's scaled_dot_product_attention."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba3_train.model.config import AttentionConfig


class AttentionState(NamedTuple):
    """Keys and values of all tokens so far, each (batch, kv_heads, tokens, head_dim); keys already rotated."""

    key: Tensor
    value: Tensor


class Attention(nn.Module):
    """Grouped-query attention over a row's own document; no positions unless `config.rotary`."""

    def __init__(self, d_model: int, config: AttentionConfig):
        super().__init__()
        self.config = config
        self.qkv_proj = nn.Linear(d_model, (config.n_heads + 2 * config.n_kv_heads) * config.head_dim, bias=False)
        self.out_proj = nn.Linear(config.n_heads * config.head_dim, d_model, bias=False)

    def forward(
        self,
        u: Tensor,
        document_ids: Tensor | None = None,
        state: AttentionState | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, AttentionState]:
        """(batch, seqlen, d_model) → the same shape. A state continues each row's first document."""
        config, seqlen = self.config, u.shape[1]
        heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads)
        q, k, v = self.qkv_proj(u).unflatten(-1, (-1, config.head_dim)).transpose(1, 2).split(heads, dim=1)
        before = 0 if state is None else state.key.shape[2]
        if config.rotary:
            q, k = (rotate_positions(vectors, before, config.rope_theta) for vectors in (q, k))
        if state is not None:
            k, v = torch.cat([state.key, k], dim=2), torch.cat([state.value, v], dim=2)
        mask = None
        if document_ids is not None or before:
            mask = _visible(document_ids, seqlen, before, u.device)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        out = self.out_proj(y.transpose(1, 2).flatten(-2))
        return (out, AttentionState(k, v)) if return_state else out


def rotate_positions(vectors: Tensor, offset: int, theta: float) -> Tensor:
    """Rotary positions offset, offset + 1, … on (batch, heads, seqlen, head_dim), halves paired."""
    half = vectors.shape[-1] // 2
    precise = torch.promote_types(vectors.dtype, torch.float32)
    frequency = theta ** (-torch.arange(half, device=vectors.device, dtype=precise) / half)
    position = torch.arange(offset, offset + vectors.shape[2], device=vectors.device, dtype=precise)
    angle = position.unsqueeze(-1) * frequency
    cos, sin = angle.cos(), angle.sin()
    first, second = vectors.to(precise).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(vectors.dtype)


def _visible(document_ids, seqlen, before, device):
    """Which of before + seqlen keys each query sees: (batch or 1, 1, seqlen, keys) bool."""
    visible = torch.ones(seqlen, before + seqlen, dtype=torch.bool, device=device).tril(before).unsqueeze(0)
    if document_ids is not None:
        # What came before the row belongs to its first document.
        keys = torch.cat([document_ids[:, :1].expand(-1, before), document_ids], dim=1)
        visible = visible & (document_ids.unsqueeze(2) == keys.unsqueeze(1))
    return visible.unsqueeze(1)
