"""Outputs of each chunk from the state before it and from its own tokens, gated; and the same kernel's way back to y.

    y_t = Σ_{s ≤ t} w_ts (q_t · k_s) x_s + 2^log_decay_t S q_t + D x_t

(reference: `chunk_outputs`, `gate_and_merge`) with w_ts of `pair_weights`; the diagonal needs no product of its own,
because the rotation cancels in q_t · k_t. The backward recomputes y and goes from the output's gradient to those of y,
z and the gate's weights; chunk_query.py and chunk_key.py go on from y's. Only rank 1 may keep y instead: it has RANK
times the size of x.
"""

import triton
import triton.language as tl

from mamba3_train.kernels.gate import gate_rows, gate_rows_backward
from mamba3_train.kernels.tiles import (
    dot_over_state,
    exp2,
    load_ids,
    load_rows,
    load_tokens,
    load_turn,
    pair_weights,
    rotate_rows,
    sum_ranks,
    sum_tokens,
    weigh_values,
)


@triton.jit(do_not_specialize=["seqlen", "chunks", "head_start", "heads_here"])
def chunk_outputs_kernel(
    x, B, C, B_bias, C_bias, D, z, mimo_x, mimo_z, mimo_o, norm_weight, document_ids, log_decay, key_log, diagonal,
    phase, states, out, kept_y, d_out, d_y, d_z, d_mimo_z, d_mimo_o, d_norm, norm_eps, seqlen, chunks,
    head_start, heads_here,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, D_STATE: tl.constexpr, PAIRS: tl.constexpr,
    RANK: tl.constexpr, CHUNK: tl.constexpr, PAIR_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """states: (batch, chunks + 1, heads_here, P, N), before each chunk.

    Forward (d_out None): writes out, like x, and for rank 1, where wanted, y before norm and gate: kept_y, like x.

    Backward (out None): d_y: (batch, heads_here, padded length · RANK, P); d_z like z; d_mimo_z, d_mimo_o:
    (batch, chunks, HEADS, RANK, P) and d_norm: (…, HEADS, P), one partial sum a chunk.
    """
    ROWS: tl.constexpr = CHUNK * RANK
    STRIDE: tl.constexpr = GROUPS * D_STATE
    DOCUMENTS: tl.constexpr = document_ids is not None
    dtype: tl.constexpr = x.dtype.element_ty
    chunk = tl.program_id(0) // heads_here
    here = tl.program_id(0) % heads_here
    batch = tl.program_id(1).to(tl.int64)
    head = head_start + here
    start = batch * seqlen + chunk * CHUNK
    left = seqlen - chunk * CHUNK
    scalars = (batch * HEADS + head) * chunks * CHUNK + chunk * CHUNK
    keys = start * (RANK * STRIDE) + head // (HEADS // GROUPS) * D_STATE
    tokens = (start * HEADS + head) * HEAD_DIM
    slot = ((batch * (chunks + 1) + chunk) * heads_here + here) * (HEAD_DIM * D_STATE)
    row = tl.arange(0, ROWS)
    token = row // RANK
    rank = row % RANK
    valid = token < left
    column = tl.arange(0, HEAD_DIM)

    # Loads first: a dot's barriers keep later loads from being issued early.
    q0, q1, q2 = load_rows(C + keys, row, valid, D_STATE, STRIDE, PAIRS, PAIR_BLOCK, REST_BLOCK)
    k0, k1, k2 = load_rows(B + keys, row, valid, D_STATE, STRIDE, PAIRS, PAIR_BLOCK, REST_BLOCK)
    cos, sin = load_turn(phase + scalars * PAIRS, token, PAIRS, PAIR_BLOCK, HARDWARE)
    s0, s1, s2 = load_rows(states + slot, column, column >= 0, D_STATE, D_STATE, PAIRS, PAIR_BLOCK, REST_BLOCK)
    v = load_tokens(x + tokens, token, valid, HEADS, HEAD_DIM)
    gate = 0.0
    if z is not None:
        gate = load_tokens(z + tokens, token, valid, HEADS, HEAD_DIM)
    decay = tl.load(log_decay + scalars + token)
    key = tl.load(key_log + scalars + token)
    gamma = tl.load(diagonal + scalars + token)
    ids = load_ids(document_ids, start, token, left)

    q0, q1, q2 = rotate_rows(q0, q1, q2, None if C_bias is None else C_bias + head * (RANK * D_STATE), rank, cos, sin,
                             None, dtype, D_STATE, PAIRS, RANK, PAIR_BLOCK, REST_BLOCK)  # fmt: skip
    # [rows, N] @ [P, N]ᵀ -> [rows, P]
    y = dot_over_state(q0, q1, q2, s0, s1, s2, PAIRS, D_STATE, PRECISION)
    from_start = exp2(decay, HARDWARE)
    if DOCUMENTS:
        from_start = tl.where(
            ids == load_ids(document_ids, start, tl.maximum(-1, -chunk * CHUNK), left), from_start, 0.0
        )
    y *= from_start[:, None]
    k0, k1, k2 = rotate_rows(k0, k1, k2, None if B_bias is None else B_bias + head * (RANK * D_STATE), rank, cos, sin,
                             None, dtype, D_STATE, PAIRS, RANK, PAIR_BLOCK, REST_BLOCK)  # fmt: skip
    # [rows, N] @ [rows, N]ᵀ -> [rows, rows]
    scores = dot_over_state(q0, q1, q2, k0, k1, k2, PAIRS, D_STATE, PRECISION)
    scores *= pair_weights(decay[:, None], key[None, :], gamma[:, None], token[:, None], token[None, :], ids[:, None],
                           ids[None, :], DOCUMENTS, HARDWARE)  # fmt: skip
    v = weigh_values(v, None if mimo_x is None else mimo_x + head * (RANK * HEAD_DIM), rank, RANK, HEAD_DIM)
    # [rows, rows] @ [rows, P] -> [rows, P]
    y = tl.dot(scores.to(dtype), v, y, input_precision=PRECISION)
    if D is not None:
        y += tl.load(D + head).to(tl.float32) * v.to(tl.float32)

    weights = head * (RANK * HEAD_DIM)
    gate_z = None if mimo_z is None else mimo_z + weights
    gate_o = None if mimo_o is None else mimo_o + weights
    norm = None if norm_weight is None else norm_weight + head * HEAD_DIM
    to = tl.arange(0, CHUNK)[:, None]
    at = to * (HEADS * HEAD_DIM) + column[None, :]
    if d_out is None:
        if kept_y is not None:
            tl.store(kept_y + tokens + at, y.to(kept_y.dtype.element_ty), mask=to < left)
        y = gate_rows(y, None if z is None else gate, gate_z, gate_o, norm, norm_eps, rank, RANK, HEAD_DIM, HARDWARE)
        y = sum_ranks(y, CHUNK, RANK, HEAD_DIM)
        tl.store(out + tokens + at, y.to(out.dtype.element_ty), mask=to < left)
    else:
        by_out = load_tokens(d_out + tokens, token, valid, HEADS, HEAD_DIM).to(tl.float32)
        by_y, by_z, by_mimo_z, by_mimo_o, by_norm = gate_rows_backward(
            y, by_out, None if z is None else gate, gate_z, gate_o, norm, norm_eps, rank, RANK, HEAD_DIM, HARDWARE
        )
        rows = ((batch * heads_here + here) * chunks + chunk) * (ROWS * HEAD_DIM)
        tl.store(d_y + rows + row[:, None] * HEAD_DIM + column[None, :], by_y.to(dtype))
        partial = (batch * chunks + chunk) * HEADS + head
        ranks = tl.arange(0, 16)[:, None]
        rank_at = (partial * RANK + ranks) * HEAD_DIM + column[None, :]
        if z is not None:
            by_z = sum_ranks(by_z, CHUNK, RANK, HEAD_DIM)
            tl.store(d_z + tokens + at, by_z.to(d_z.dtype.element_ty), mask=to < left)
            if mimo_z is not None:
                tl.store(d_mimo_z + rank_at, sum_tokens(by_mimo_z, rank, dtype, 16, PRECISION), mask=ranks < RANK)
        if mimo_o is not None:
            tl.store(d_mimo_o + rank_at, sum_tokens(by_mimo_o, rank, dtype, 16, PRECISION), mask=ranks < RANK)
        if norm_weight is not None:
            tl.store(d_norm + partial * HEAD_DIM + column, tl.sum(by_norm, axis=0))
