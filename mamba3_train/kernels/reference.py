"""The definition of the Mamba-3 scan: the recurrence token by token, and the same thing in chunks.

Paper (arXiv 2603.15569), per head, with λ = sigmoid(trap), φ = π · tanh(angles) · dt, R(φ) rotating pairs of the state:

    α_t = exp(dt_t A_t)    β_t = (1 − λ_t) dt_t α_t    γ_t = λ_t dt_t
    H_t = R(−φ_t) [α_t H_{t−1} + β_t Σ_r b_{t−1,r} x_{t−1,r}ᵀ] + γ_t Σ_r b_{t,r} x_{t,r}ᵀ      H ∈ ℝ^{N×P}
    y_{t,r} = H_tᵀ c_{t,r} + D x_{t,r}         b = B + B_bias, c = C + C_bias, x_{t,r} = mimo_x_r ⊙ x_t
    out_t = Σ_r mimo_o_r ⊙ y_{t,r} ⊙ SiLU(mimo_z_r ⊙ z_t)

The state is kept in the frame of its own last token, so no angle is ever summed over more than a chunk and none loses
precision. SISO is rank 1 without the mimo tensors.

Letters: N state width, P head width, R rank, H heads, G groups of B and C, S rotated pairs. Layout of the N dimension:
[S first halves | S second halves | N − 2S unrotated], each contiguous.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ScanState(NamedTuple):
    """What a sequence hands over to its continuation.

    ssm: (batch, heads, head_dim, d_state), the state H transposed, in the frame of the last token.
    B: (batch, rank, groups, d_state), the last token's B before bias: the trapezoid looks back one token.
    x: (batch, heads, head_dim), the last token's x.
    """

    ssm: Tensor
    B: Tensor
    x: Tensor


def rotation_increments(angles: Tensor, dt: Tensor) -> Tensor:
    """Angle by which each token turns the state, in radians: (batch, seqlen, heads or 1, S).

    angles: (batch, seqlen, S) logits (data-dependent, paper §3.2), or (S,) fixed radians a token, whatever dt is.
    """
    if angles.dim() == 1:
        return angles.expand(*dt.shape[:2], 1, -1).to(dt.dtype)
    return math.pi * torch.tanh(angles.to(dt.dtype)).unsqueeze(2) * dt.unsqueeze(-1)


def rotate(vectors: Tensor, angle: Tensor) -> Tensor:
    """Turn the first S pairs of (..., N) vectors by (..., S) radians; the other N − 2S entries stay."""
    pairs = angle.shape[-1]
    first, second, rest = vectors.split([pairs, pairs, vectors.shape[-1] - 2 * pairs], dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], dim=-1)


def gate_and_merge(y, z, mimo_z, mimo_o, norm_weight, norm_eps):
    """Optional norm, gate and sum over ranks: (..., H, R, P) → (..., H, P) (paper §3.3; norm: appendix on hybrids)."""
    if norm_weight is not None:
        y = F.rms_norm(y, y.shape[-1:], eps=norm_eps) * norm_weight.unsqueeze(-2)
    if z is not None:
        z = z.unsqueeze(-2)
        y = y * F.silu(z if mimo_z is None else z * mimo_z)
    return y.squeeze(-2) if mimo_o is None else (y * mimo_o).sum(-2)


def scan_recurrent(
    x, B, C, dt, A, trap, angles, B_bias, C_bias, D, z, mimo_x, mimo_z, mimo_o,
    *, norm_weight=None, norm_eps=1e-5, document_ids=None, initial_state=None,
):  # fmt: skip
    """The recurrence, one token after the other; arguments and results as in `scan.mamba3_scan`, dtypes equal."""
    batch, seqlen, heads, head_dim = x.shape
    d_state = B.shape[-1]
    decay = torch.exp(dt * A)
    mix = torch.ones_like(dt) if trap is None else torch.sigmoid(trap)
    turn = None if angles is None else rotation_increments(angles, dt)
    b, c = _per_head(B, B_bias, heads), _per_head(C, C_bias, heads)
    x_ranks = x.unsqueeze(3) if mimo_x is None else x.unsqueeze(3) * mimo_x

    if initial_state is None:
        ssm = x.new_zeros(batch, heads, head_dim, d_state)
        outer_before = torch.zeros_like(ssm)
    else:
        ssm, outer_before = initial_state.ssm, _outer(initial_state, B_bias, mimo_x)

    outputs = []
    for t in range(seqlen):
        if document_ids is not None and t > 0:
            same = (document_ids[:, t] == document_ids[:, t - 1]).view(batch, 1, 1, 1)
            ssm, outer_before = torch.where(same, ssm, 0.0), torch.where(same, outer_before, 0.0)
        alpha, beta, gamma = (v[:, t, :, None, None] for v in (decay, (1 - mix) * dt * decay, mix * dt))
        ssm = alpha * ssm + beta * outer_before
        if turn is not None:
            ssm = rotate(ssm, -turn[:, t].unsqueeze(-2))
        outer_before = torch.einsum("bhrp,bhrn->bhpn", x_ranks[:, t], b[:, t])
        ssm = ssm + gamma * outer_before
        outputs.append(torch.einsum("bhpn,bhrn->bhrp", ssm, c[:, t]))
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + D.view(heads, 1, 1) * x_ranks
    return gate_and_merge(y, z, mimo_z, mimo_o, norm_weight, norm_eps), ScanState(ssm, B[:, -1], x[:, -1])


def scan_chunked(
    x, B, C, dt, A, trap, angles, B_bias, C_bias, D, z, mimo_x, mimo_z, mimo_o,
    *, norm_weight=None, norm_eps=1e-5, document_ids=None, initial_state=None, chunk_size=64,
):  # fmt: skip
    """The same function in chunks: matrix products inside a chunk, one state handed from chunk to chunk.

    The four stages below are what the kernels compute, each under the same name.
    """
    seqlen, heads = x.shape[1:3]
    chunk_size = min(chunk_size, seqlen)
    scales = token_scales(dt, A, trap, document_ids)
    turn = None if angles is None else rotation_increments(angles, dt)
    x_ranks = x.unsqueeze(3) if mimo_x is None else x.unsqueeze(3) * mimo_x
    b, c = _per_head(B, B_bias, heads), _per_head(C, C_bias, heads)

    # (batch, seqlen, …) → (batch, chunks, chunk, …); padding has dt = 0 and no angle, so it leaves the state alone.
    log_decay, key_scale, diagonal, b, c, v = (_into_chunks(tensor, chunk_size) for tensor in (*scales, b, c, x_ranks))
    turn = None if turn is None else _into_chunks(turn, chunk_size)
    ids = None if document_ids is None else _into_chunks(document_ids, chunk_size, repeat_last=True)

    log_decay = cumsum_within_documents(log_decay, ids)
    if turn is not None:
        turn = cumsum_within_documents(turn, ids)
        b, c = rotate(b, turn.unsqueeze(-2)), rotate(c, turn.unsqueeze(-2))
    # Rows of all ranks of a token stand together: (batch, chunks, heads, chunk · rank, N or P).
    b, c, v = (tensor.movedim(3, 2).flatten(3, 4) for tensor in (b, c, v))

    states, chunk_decay = chunk_states(b, v, log_decay, key_scale, ids)
    first = None
    if initial_state is not None:
        first = state_with_look_ahead(initial_state, dt[:, 0], None if trap is None else trap[:, 0], B_bias, mimo_x)
    states_before, last = state_passing(states, chunk_decay, turn, first)
    y = chunk_outputs(b, c, v, log_decay, key_scale, diagonal, ids, states_before)

    rank = B.shape[2]
    y = y.unflatten(3, (chunk_size, rank)).movedim(2, 3).flatten(1, 2)[:, :seqlen]
    if D is not None:
        y = y + D.view(heads, 1, 1) * x_ranks
    return gate_and_merge(y, z, mimo_z, mimo_o, norm_weight, norm_eps), ScanState(last, B[:, -1], x[:, -1])


def token_scales(dt, A, trap, document_ids):
    """Log decay, key scale f and diagonal scale γ of every token, each (batch, seqlen, heads).

    The trapezoid's two rank-1 updates a token merge into one key with scale
    f_s = λ_s dt_s + (1 − λ_{s+1}) dt_{s+1}; the second part is zero for the last token of a document.
    """
    if trap is None:
        return dt * A, dt, dt
    mix = torch.sigmoid(trap)
    diagonal = mix * dt
    ahead = F.pad(((1 - mix) * dt)[:, 1:], (0, 0, 0, 1))
    if document_ids is not None:
        goes_on = F.pad(document_ids[:, 1:] == document_ids[:, :-1], (0, 1))
        ahead = torch.where(goes_on.unsqueeze(-1), ahead, 0.0)
    return dt * A, diagonal + ahead, diagonal


def cumsum_within_documents(values: Tensor, ids: Tensor | None) -> Tensor:
    """Inclusive sum along each chunk, starting again at each document: (batch, chunks, chunk, …).

    By doubling spans, so that not one bit of a document's sums comes from another document.
    """
    if ids is None:
        return values.cumsum(2)
    span, length = 1, values.shape[2]
    while span < length:
        same = (ids[:, :, span:] == ids[:, :, :-span]).view(*ids.shape[:2], -1, *[1] * (values.dim() - 3))
        shifted = torch.where(same, values[:, :, :-span], 0.0)
        values = torch.cat([values[:, :, :span], values[:, :, span:] + shifted], dim=2)
        span *= 2
    return values


def chunk_states(b, v, log_decay, key_scale, ids):
    """What each chunk adds to the state at its end, before turning into the end's frame, and the chunk's decay.

    b: (batch, chunks, heads, chunk · rank, N) rotated; v: (…, P); log_decay, key_scale: (batch, chunks, chunk, heads).
    Returns (batch, chunks, heads, P, N) and (batch, chunks, heads); only the last token's document counts.
    """
    to_end = log_decay[:, :, -1:] - log_decay
    chunk_decay = log_decay[:, :, -1].exp()
    if ids is not None:
        to_end = torch.where((ids == ids[:, :, -1:]).unsqueeze(-1), to_end, -math.inf)
        chunk_decay = torch.where(_continues(ids)[:, :, -1:], chunk_decay, 0.0)
    scale = (to_end.exp() * key_scale).transpose(2, 3)
    rank = v.shape[3] // scale.shape[3]
    return (v * scale.repeat_interleave(rank, dim=3).unsqueeze(-1)).transpose(-1, -2) @ b, chunk_decay


def state_passing(states, chunk_decay, turn, first):
    """State before every chunk, (batch, chunks, heads, P, N), and the state after the last one.

    first: the state before the first chunk or None for zero; turn: (batch, chunks, chunk, heads or 1, S) summed angles.
    """
    running = torch.zeros_like(states[:, 0]) if first is None else first
    before = []
    for i in range(states.shape[1]):
        before.append(running)
        running = chunk_decay[:, i, :, None, None] * running + states[:, i]
        if turn is not None:
            running = rotate(running, -turn[:, i, -1].unsqueeze(-2))
    return torch.stack(before, dim=1), running


def chunk_outputs(b, c, v, log_decay, key_scale, diagonal, ids, states_before):
    """Outputs from the incoming state and from the chunk's own tokens: (batch, chunks, heads, chunk · rank, P)."""
    chunk_size = log_decay.shape[2]
    rank = v.shape[3] // chunk_size
    earlier = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=v.device).tril(-1)
    from_start = log_decay.exp()
    if ids is not None:
        earlier = (earlier & (ids.unsqueeze(3) == ids.unsqueeze(2))).unsqueeze(2)
        from_start = torch.where(_continues(ids).unsqueeze(-1), from_start, 0.0)
    log_decay = log_decay.transpose(2, 3)
    # Masked before the exponential: across documents the difference can be large and positive.
    decay = torch.where(earlier, log_decay.unsqueeze(-1) - log_decay.unsqueeze(-2), -math.inf).exp()
    weight = decay * key_scale.transpose(2, 3).unsqueeze(-2) + torch.diag_embed(diagonal.transpose(2, 3))
    if rank > 1:
        weight = weight.repeat_interleave(rank, dim=-1).repeat_interleave(rank, dim=-2)
    within = (c @ b.transpose(-1, -2) * weight) @ v
    carried = c @ states_before.transpose(-1, -2)
    return within + carried * from_start.transpose(2, 3).repeat_interleave(rank, dim=3).unsqueeze(-1)


def _per_head(B, bias, heads):
    """B or C for every head, biased: (batch, seqlen, R, G, N) → (batch, seqlen, H, R, N)."""
    B = B.transpose(2, 3).repeat_interleave(heads // B.shape[3], dim=2)
    return B if bias is None else B + bias


def _into_chunks(tensor, chunk_size, repeat_last=False):
    """(batch, seqlen, …) → (batch, chunks, chunk_size, …), the tail filled with zeros or with the last entry."""
    missing = -tensor.shape[1] % chunk_size
    if missing:
        tail = tensor[:, -1:].expand(-1, missing, *tensor.shape[2:])
        tensor = torch.cat([tensor, tail if repeat_last else torch.zeros_like(tail)], dim=1)
    return tensor.unflatten(1, (-1, chunk_size))


def _continues(ids):
    """Whether each token belongs to the document that was running before its chunk: (batch, chunks, chunk)."""
    running = torch.cat([ids[:, :1, 0], ids[:, :-1, -1]], dim=1)
    return ids == running.unsqueeze(-1)


def state_with_look_ahead(state, dt, trap, B_bias, mimo_x):
    """The incoming state plus what the first token's trapezoid takes from the token before: (batch, heads, P, N).

    dt, trap: (batch, heads), of the first token; trap None means λ = 1, which looks at no other token.
    """
    if trap is None:
        return state.ssm
    ahead = ((1 - torch.sigmoid(trap)) * dt)[:, :, None, None]
    return state.ssm + ahead * _outer(state, B_bias, mimo_x)


def _outer(state, B_bias, mimo_x):
    """Σ_r x_r b_rᵀ of the token before: (batch, heads, P, N)."""
    b = _per_head(state.B.unsqueeze(1), B_bias, state.x.shape[1])[:, 0]
    x = state.x.unsqueeze(2) if mimo_x is None else state.x.unsqueeze(2) * mimo_x
    return torch.einsum("bhrp,bhrn->bhpn", x, b)
