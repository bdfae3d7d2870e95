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
    by_row,
    by_token,
    dot_over_state,
    exp2,
    fetch_chunk_ahead,
    hold,
    hold_parts,
    load_bias,
    load_ids,
    load_phase,
    load_ranks,
    load_rows,
    load_tokens,
    rotate_rows,
    sum_tokens,
    turn_of,
    weigh_pairs,
    weigh_values,
)


@triton.jit(do_not_specialize=["seqlen", "chunks", "head_start"])
def chunk_outputs_kernel(
    x, B, C, B_bias, C_bias, D, z, mimo_x, mimo_z, mimo_o, norm_weight, document_ids, log_decay, key_log, diagonal,
    phase, states, out, kept_y, d_out, d_y, d_z, d_mimo_z, d_mimo_o, d_norm, norm_eps, seqlen, chunks,
    head_start,
    HEADS: tl.constexpr, HEADS_HERE: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, D_STATE: tl.constexpr,
    PAIRS: tl.constexpr, RANK: tl.constexpr, CHUNK: tl.constexpr, PAIR_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, HARDWARE: tl.constexpr, TOKEN_STRIDE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """states: (batch, chunks + 1, HEADS_HERE, P, N), before each chunk.

    Forward (d_out None): writes out, like x, and for rank 1, where wanted, y before norm and gate: kept_y, like x.

    Backward (out None): d_y: (batch, HEADS_HERE, padded length · RANK, P); d_z like z; d_mimo_z, d_mimo_o:
    (batch, chunks, HEADS, RANK, P) and d_norm: (…, HEADS, P), one partial sum a chunk.
    """
    ROWS: tl.constexpr = CHUNK * RANK
    STRIDE: tl.constexpr = GROUPS * D_STATE
    DOCUMENTS: tl.constexpr = document_ids is not None
    dtype: tl.constexpr = x.dtype.element_ty
    chunk = tl.program_id(0) // HEADS_HERE
    here = tl.program_id(0) % HEADS_HERE
    batch = tl.program_id(1).to(tl.int64)
    head = head_start + here
    start = batch * seqlen + chunk * CHUNK
    left = seqlen - chunk * CHUNK
    scalars = (batch * HEADS + head) * chunks * CHUNK + chunk * CHUNK
    keys = start * (RANK * STRIDE) + head // (HEADS // GROUPS) * D_STATE
    values = start * TOKEN_STRIDE + head * HEAD_DIM
    tokens = (start * HEADS + head) * HEAD_DIM
    slot = ((batch * (chunks + 1) + chunk) * HEADS_HERE + here) * (HEAD_DIM * D_STATE)
    row = tl.arange(0, ROWS)
    valid = row // RANK < left
    token = tl.arange(0, CHUNK)
    column = tl.arange(0, HEAD_DIM)
    MIMO: tl.constexpr = mimo_x is not None

    # All loads are issued before the first is held: see `hold`.
    q0, q1, q2 = load_rows(C + keys, row, valid, D_STATE, STRIDE, PAIRS, PAIR_BLOCK, REST_BLOCK)
    s0, s1, s2 = load_rows(states + slot, column, column >= 0, D_STATE, D_STATE, PAIRS, PAIR_BLOCK, REST_BLOCK)
    fraction = load_phase(phase + scalars * PAIRS, PAIRS, CHUNK, PAIR_BLOCK)
    k0, k1, k2 = load_rows(B + keys, row, valid, D_STATE, STRIDE, PAIRS, PAIR_BLOCK, REST_BLOCK)
    v = load_tokens(x + values, left, CHUNK, TOKEN_STRIDE, HEAD_DIM)
    gate = 0.0
    if z is not None:
        gate = load_tokens(z + values, left, CHUNK, TOKEN_STRIDE, HEAD_DIM)
    by_out = 0.0
    if d_out is not None:
        by_out = load_tokens(d_out + tokens, left, CHUNK, HEADS * HEAD_DIM, HEAD_DIM)
    decay = tl.load(log_decay + scalars + row // RANK)
    decay_t = tl.load(log_decay + scalars + token)
    key_t = tl.load(key_log + scalars + token)
    gamma_t = tl.load(diagonal + scalars + token)
    c0, c1, c2 = load_bias(C_bias, head, D_STATE, PAIRS, RANK, PAIR_BLOCK, REST_BLOCK)
    b0, b1, b2 = load_bias(B_bias, head, D_STATE, PAIRS, RANK, PAIR_BLOCK, REST_BLOCK)
    skip = 0.0 if D is None else tl.load(D + head).to(tl.float32)
    q0, q1, q2 = hold_parts(q0, q1, q2, PAIRS, D_STATE, HARDWARE)
    s0, s1, s2 = hold_parts(s0, s1, s2, PAIRS, D_STATE, HARDWARE)
    cos, sin = turn_of(fraction, PAIRS, HARDWARE)
    k0, k1, k2 = hold_parts(k0, k1, k2, PAIRS, D_STATE, HARDWARE)
    v = hold(v, HARDWARE)
    if z is not None:
        gate = hold(gate, HARDWARE)
    if d_out is not None:
        by_out = hold(by_out, HARDWARE)

    q0, q1, q2 = rotate_rows(q0, q1, q2, c0, c1, c2, cos, sin, None, C_bias is not None, dtype, PAIRS, D_STATE, CHUNK,
                             RANK)  # fmt: skip
    # [rows, N] @ [P, N]ᵀ -> [rows, P]
    y = dot_over_state(q0, q1, q2, s0, s1, s2, PAIRS, D_STATE, PRECISION)
    from_start = exp2(decay, HARDWARE)
    ids = load_ids(document_ids, start, token, left)
    if DOCUMENTS:
        running = load_ids(document_ids, start, tl.maximum(-1, -chunk * CHUNK), left)
        from_start = tl.where(load_ids(document_ids, start, row // RANK, left) == running, from_start, 0.0)
    y *= from_start[:, None]
    k0, k1, k2 = rotate_rows(k0, k1, k2, b0, b1, b2, cos, sin, None, B_bias is not None, dtype, PAIRS, D_STATE, CHUNK,
                             RANK)  # fmt: skip
    # [rows, N] @ [rows, N]ᵀ -> [rows, rows]
    scores = dot_over_state(q0, q1, q2, k0, k1, k2, PAIRS, D_STATE, PRECISION)
    scores = weigh_pairs(scores, decay_t[:, None], key_t[None, :], gamma_t[:, None], token[:, None], token[None, :],
                         ids[:, None], ids[None, :], DOCUMENTS, HARDWARE, CHUNK, RANK)  # fmt: skip
    if D is not None:
        scores += tl.where(row[:, None] == row[None, :], skip, 0.0)
    v = weigh_values(v, load_ranks(mimo_x, head, RANK, HEAD_DIM) if MIMO else None, MIMO, CHUNK, RANK)
    if AHEAD > 0:
        fetch_chunk_ahead(
            states, None, phase, x, z, seqlen, chunks, head_start, chunks + 1,
            HEADS, HEADS_HERE, HEAD_DIM, D_STATE, PAIRS, RANK, CHUNK, TOKEN_STRIDE, AHEAD,
        )  # fmt: skip
    # [rows, rows] @ [rows, P] -> [rows, P]
    y = by_token(tl.dot(scores.to(dtype), v, y, input_precision=PRECISION), CHUNK, RANK)

    gate_z = None if mimo_z is None else load_ranks(mimo_z, head, RANK, HEAD_DIM)
    gate_o = None if mimo_o is None else load_ranks(mimo_o, head, RANK, HEAD_DIM)
    norm = None if norm_weight is None else load_ranks(norm_weight, head, 1, HEAD_DIM)
    at = token[:, None] * (HEADS * HEAD_DIM) + column[None, :]
    known = token[:, None] < left
    if d_out is None:
        if kept_y is not None:
            tl.store(kept_y + tokens + at, y.to(kept_y.dtype.element_ty), mask=known)
        y = gate_rows(y, None if z is None else gate, gate_z, gate_o, norm, norm_eps, RANK, HEAD_DIM, HARDWARE)
        if RANK > 1:
            y = tl.sum(y, axis=1)
        tl.store(out + tokens + at, y.to(out.dtype.element_ty), mask=known)
    else:
        by_y, by_z, by_mimo_z, by_mimo_o, by_norm = gate_rows_backward(
            y, by_out.to(tl.float32), None if z is None else gate, gate_z, gate_o, norm, norm_eps, RANK, HEAD_DIM,
            HARDWARE
        )  # fmt: skip
        rows = ((batch * HEADS_HERE + here) * chunks + chunk) * (ROWS * HEAD_DIM)
        to = d_y + rows + row[:, None] * HEAD_DIM + column[None, :]
        tl.store(to, by_row(by_y, CHUNK, RANK).to(dtype))
        partial = (batch * chunks + chunk) * HEADS + head
        ranks = tl.arange(0, 16)[:, None]
        rank_at = (partial * RANK + ranks) * HEAD_DIM + column[None, :]
        rank = row % RANK
        if z is not None:
            if RANK > 1:
                by_z = tl.sum(by_z, axis=1)
            tl.store(d_z + tokens + at, by_z.to(d_z.dtype.element_ty), mask=known)
            if mimo_z is not None:
                by_mimo_z = sum_tokens(by_row(by_mimo_z, CHUNK, RANK), rank, dtype, 16, PRECISION)
                tl.store(d_mimo_z + rank_at, by_mimo_z, mask=ranks < RANK)
        if mimo_o is not None:
            by_mimo_o = sum_tokens(by_row(by_mimo_o, CHUNK, RANK), rank, dtype, 16, PRECISION)
            tl.store(d_mimo_o + rank_at, by_mimo_o, mask=ranks < RANK)
        if norm_weight is not None:
            tl.store(d_norm + partial * HEAD_DIM + column, tl.sum(by_row(by_norm, CHUNK, RANK), axis=0))
