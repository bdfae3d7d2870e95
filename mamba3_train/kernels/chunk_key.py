"""Gradients on the key side of a chunk: x, B, D, mimo_x, scales; from its outputs and from the state at its end.

    dx_s = Σ_{t ≥ s} w_ts (k_s · q_t) dy_t + e_s dS k_s + D dy_s        e_s = 2^(total − key_log_s)
    dk_s = Σ_{t ≥ s} w_ts (x_s · dy_t) q_t + e_s dSᵀ x_s

The transposed products (keys in rows) are computed as such: transposing a narrowed accumulator into the left operand of
a dot is miscompiled by Triton 3.4 to 3.7.0 on Hopper.
"""

import triton
import triton.language as tl

from mamba3_train.kernels.tiles import (
    by_row,
    by_token,
    dot_into_state,
    dot_over_state,
    exp2,
    fetch_chunk_ahead,
    for_ranks,
    for_tokens,
    hold,
    hold_parts,
    load_bias,
    load_ids,
    load_phase,
    load_ranks,
    load_rows,
    load_tokens,
    rotate_back,
    rotate_rows,
    rotation_gradients,
    scale_parts,
    store_parts,
    sum_ranks,
    sum_tokens,
    turn_of,
    weigh_pairs,
    weigh_values,
    zero_parts,
)


@triton.jit(do_not_specialize=["seqlen", "chunks", "head_start"])
def chunk_keys_backward_kernel(
    x, B, C, B_bias, C_bias, D, mimo_x, document_ids, log_decay, key_log, diagonal, phase, d_states, d_y,
    d_x, d_keys, d_phase, inner, d_diagonal, d_D, d_mimo_x, seqlen, chunks, head_start,
    HEADS: tl.constexpr, HEADS_HERE: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, D_STATE: tl.constexpr,
    PAIRS: tl.constexpr, RANK: tl.constexpr, CHUNK: tl.constexpr, PAIR_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, HARDWARE: tl.constexpr, TOKEN_STRIDE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """d_states: (batch, chunks, HEADS_HERE, P, N), of the state at each chunk's end.

    d_y: (batch, HEADS_HERE, padded length · RANK, P); d_keys: (…, N), by B before rotation, of this head alone.
    d_phase: the keys' share is added to the queries'. inner, d_diagonal: (batch, HEADS, padded length). d_D: (batch,
    chunks, HEADS) and d_mimo_x: (batch, chunks, HEADS, RANK, P), one partial sum a chunk.
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
    rows = ((batch * HEADS_HERE + here) * chunks + chunk) * ROWS
    keys = start * (RANK * STRIDE) + head // (HEADS // GROUPS) * D_STATE
    tokens = (start * HEADS + head) * HEAD_DIM
    partial = (batch * chunks + chunk) * HEADS + head
    slot = ((batch * chunks + chunk) * HEADS_HERE + here) * (HEAD_DIM * D_STATE)
    row = tl.arange(0, ROWS)
    valid = row // RANK < left
    token = tl.arange(0, CHUNK)
    column = tl.arange(0, HEAD_DIM)
    MIMO: tl.constexpr = mimo_x is not None

    # All loads are issued before the first is held: see `hold`.
    k0, k1, k2 = load_rows(B + keys, row, valid, D_STATE, STRIDE, PAIRS, PAIR_BLOCK, REST_BLOCK)
    fraction = load_phase(phase + scalars * PAIRS, PAIRS, CHUNK, PAIR_BLOCK)
    s0, s1, s2 = load_rows(d_states + slot, column, column >= 0, D_STATE, D_STATE, PAIRS, PAIR_BLOCK, REST_BLOCK)
    q0, q1, q2 = load_rows(C + keys, row, valid, D_STATE, STRIDE, PAIRS, PAIR_BLOCK, REST_BLOCK)
    raw = load_tokens(x + start * TOKEN_STRIDE + head * HEAD_DIM, left, CHUNK, TOKEN_STRIDE, HEAD_DIM)
    by_y = tl.load(d_y + rows * HEAD_DIM + row[:, None] * HEAD_DIM + column[None, :])
    total = tl.load(log_decay + scalars + CHUNK - 1)
    key = tl.load(key_log + scalars + row // RANK)
    decay_t = tl.load(log_decay + scalars + token)
    key_t = tl.load(key_log + scalars + token)
    gamma_t = tl.load(diagonal + scalars + token)
    b0, b1, b2 = load_bias(B_bias, head, D_STATE, PAIRS, RANK, PAIR_BLOCK, REST_BLOCK)
    c0, c1, c2 = load_bias(C_bias, head, D_STATE, PAIRS, RANK, PAIR_BLOCK, REST_BLOCK)
    skip = 0.0 if D is None else tl.load(D + head).to(tl.float32)
    if AHEAD > 0:
        fetch_chunk_ahead(
            d_states, d_y, phase, x, None, seqlen, chunks, head_start, chunks,
            HEADS, HEADS_HERE, HEAD_DIM, D_STATE, PAIRS, RANK, CHUNK, TOKEN_STRIDE, AHEAD,
        )  # fmt: skip
    k0, k1, k2 = hold_parts(k0, k1, k2, PAIRS, D_STATE, HARDWARE)
    cos, sin = turn_of(fraction, PAIRS, HARDWARE)
    s0, s1, s2 = hold_parts(s0, s1, s2, PAIRS, D_STATE, HARDWARE)
    q0, q1, q2 = hold_parts(q0, q1, q2, PAIRS, D_STATE, HARDWARE)
    raw = hold(raw, HARDWARE)
    by_y = hold(by_y, HARDWARE)

    ids = load_ids(document_ids, start, token, left)
    to_end = exp2(total - key, HARDWARE)
    if DOCUMENTS:
        ending = load_ids(document_ids, start, CHUNK - 1, left)
        to_end = tl.where(load_ids(document_ids, start, row // RANK, left) == ending, to_end, 0.0)
    k0, k1, k2 = rotate_rows(k0, k1, k2, b0, b1, b2, cos, sin, None, B_bias is not None, dtype, PAIRS, D_STATE, CHUNK,
                             RANK)  # fmt: skip
    # [rows, N] @ [P, N]ᵀ -> [rows, P], from the state
    d_v = dot_over_state(k0, k1, k2, s0, s1, s2, PAIRS, D_STATE, PRECISION) * to_end[:, None]
    q0, q1, q2 = rotate_rows(q0, q1, q2, c0, c1, c2, cos, sin, None, C_bias is not None, dtype, PAIRS, D_STATE, CHUNK,
                             RANK)  # fmt: skip
    # [rows, N] @ [rows, N]ᵀ and [rows, P] @ [rows, P]ᵀ -> [rows, rows]: keys in rows, queries in columns
    scores = dot_over_state(k0, k1, k2, q0, q1, q2, PAIRS, D_STATE, PRECISION)
    v = weigh_values(raw, load_ranks(mimo_x, head, RANK, HEAD_DIM) if MIMO else None, MIMO, CHUNK, RANK)
    by_score = tl.dot(v, tl.trans(by_y), input_precision=PRECISION)
    of_token = row[:, None] // RANK == row[None, :] // RANK
    same = tl.sum(tl.where(of_token, scores * by_score, 0.0), axis=1)
    tl.store(d_diagonal + scalars + token, sum_ranks(same, CHUNK, RANK))
    if D is not None:
        of_row = tl.sum(tl.where(row[:, None] == row[None, :], by_score, 0.0), axis=1)
        tl.store(d_D + partial, tl.sum(of_row, axis=0))
    scores = weigh_pairs(scores, decay_t[None, :], key_t[:, None], gamma_t[:, None], token[None, :], token[:, None],
                         ids[None, :], ids[:, None], DOCUMENTS, HARDWARE, CHUNK, RANK)  # fmt: skip
    by_score = weigh_pairs(by_score, decay_t[None, :], key_t[:, None], gamma_t[:, None], token[None, :],
                           token[:, None], ids[None, :], ids[:, None], DOCUMENTS, HARDWARE, CHUNK, RANK)  # fmt: skip
    if D is not None:
        scores += tl.where(row[:, None] == row[None, :], skip, 0.0)
    # [rows, rows] @ [rows, P] -> [rows, P]
    d_v = tl.dot(scores.to(dtype), by_y, d_v, input_precision=PRECISION)
    d_x_of = by_token(d_v, CHUNK, RANK)
    if MIMO:
        ranks = tl.arange(0, 16)[:, None]
        to = d_mimo_x + (partial * RANK + ranks) * HEAD_DIM + column[None, :]
        by_mimo = by_row(d_x_of * for_ranks(raw.to(tl.float32), RANK), CHUNK, RANK)
        tl.store(to, sum_tokens(by_mimo, row % RANK, dtype, 16, PRECISION), mask=ranks < RANK)
        d_x_of = d_x_of * for_tokens(load_ranks(mimo_x, head, RANK, HEAD_DIM), RANK)
    if RANK > 1:
        d_x_of = tl.sum(d_x_of, axis=1)
    to = d_x + tokens + token[:, None] * (HEADS * HEAD_DIM) + column[None, :]
    tl.store(to, d_x_of.to(d_x.dtype.element_ty), mask=(token < left)[:, None])

    pair = tl.arange(0, PAIR_BLOCK)
    to = d_phase + rows // RANK * PAIRS + token[:, None] * PAIRS + pair[None, :]
    known = (pair < PAIRS)[None, :] & (token >= 0)[:, None]
    of_queries = 0.0
    if PAIRS > 0:
        of_queries = tl.load(to, mask=known, other=0.0)
    fraction = load_phase(phase + scalars * PAIRS, PAIRS, CHUNK, PAIR_BLOCK)  # again: fewer registers
    # [rows, P] @ [P, N] -> [rows, N], from the state; [rows, rows] @ [rows, N] -> [rows, N], from the chunk's queries
    d0, d1, d2 = zero_parts(ROWS, D_STATE, PAIRS, PAIR_BLOCK, REST_BLOCK)
    d0, d1, d2 = dot_into_state(v, s0, s1, s2, d0, d1, d2, PAIRS, D_STATE, PRECISION)
    d0, d1, d2 = scale_parts(d0, d1, d2, to_end[:, None], PAIRS, D_STATE)
    d0, d1, d2 = dot_into_state(by_score.to(dtype), q0, q1, q2, d0, d1, d2, PAIRS, D_STATE, PRECISION)
    by_decay, by_angle = rotation_gradients(k0, k1, k2, d0, d1, d2, PAIRS, D_STATE)
    tl.store(inner + scalars + token, sum_ranks(by_decay, CHUNK, RANK))
    if PAIRS > 0:
        tl.store(to, hold(of_queries, HARDWARE) + sum_ranks(by_angle, CHUNK, RANK), mask=known)
    cos, sin = turn_of(fraction, PAIRS, HARDWARE)
    d0, d1 = rotate_back(d0, d1, cos, sin, PAIRS, CHUNK, RANK)
    store_parts(d_keys + rows * D_STATE, row, row >= 0, d0, d1, d2, D_STATE, PAIRS, PAIR_BLOCK, REST_BLOCK)
