"""Gradients on the key side of a chunk: x, B, D, mimo_x, scales; from its outputs and from the state at its end.

    dx_s = Σ_{t ≥ s} w_ts (k_s · q_t) dy_t + e_s dS k_s + D dy_s        e_s = 2^(total − key_log_s)
    dk_s = Σ_{t ≥ s} w_ts (x_s · dy_t) q_t + e_s dSᵀ x_s

The transposed products (keys in rows) are computed as such: transposing a narrowed accumulator into the left operand of
a dot is miscompiled by Triton 3.4 to 3.7.0 on Hopper.
"""

import triton
import triton.language as tl

from mamba3_train.kernels.tiles import (
    dot_into_state,
    dot_over_state,
    exp2,
    load_ids,
    load_per_rank,
    load_rows,
    load_tokens,
    load_turn,
    pair_weights,
    rotate_back,
    rotate_rows,
    rotation_gradients,
    scale_parts,
    store_parts,
    sum_ranks,
    sum_tokens,
    weigh_values,
    zero_parts,
)


@triton.jit(do_not_specialize=["seqlen", "chunks", "head_start", "heads_here"])
def chunk_keys_backward_kernel(
    x, B, C, B_bias, C_bias, D, mimo_x, document_ids, log_decay, key_log, diagonal, phase, d_states, d_y,
    d_x, d_keys, d_phase, inner, d_diagonal, d_D, d_mimo_x, seqlen, chunks, head_start, heads_here,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, D_STATE: tl.constexpr, PAIRS: tl.constexpr,
    RANK: tl.constexpr, CHUNK: tl.constexpr, PAIR_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """d_states: (batch, chunks, heads_here, P, N), of the state at each chunk's end.

    d_y: (batch, heads_here, padded length · RANK, P); d_keys: (…, N), by B before rotation, of this head alone.
    d_phase: the keys' share is added to the queries'. inner, d_diagonal: (batch, HEADS, padded length). d_D: (batch,
    chunks, HEADS) and d_mimo_x: (batch, chunks, HEADS, RANK, P), one partial sum a chunk.
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
    rows = ((batch * heads_here + here) * chunks + chunk) * ROWS
    keys = start * (RANK * STRIDE) + head // (HEADS // GROUPS) * D_STATE
    tokens = (start * HEADS + head) * HEAD_DIM
    partial = (batch * chunks + chunk) * HEADS + head
    slot = ((batch * chunks + chunk) * heads_here + here) * (HEAD_DIM * D_STATE)
    row = tl.arange(0, ROWS)
    token = row // RANK
    rank = row % RANK
    valid = token < left
    column = tl.arange(0, HEAD_DIM)

    # Loads first: a dot's barriers keep later loads from being issued early.
    k0, k1, k2 = load_rows(B + keys, row, valid, D_STATE, STRIDE, PAIRS, PAIR_BLOCK, REST_BLOCK)
    cos, sin = load_turn(phase + scalars * PAIRS, token, PAIRS, PAIR_BLOCK, HARDWARE)
    s0, s1, s2 = load_rows(d_states + slot, column, column >= 0, D_STATE, D_STATE, PAIRS, PAIR_BLOCK, REST_BLOCK)
    v = load_tokens(x + tokens, token, valid, HEADS, HEAD_DIM)
    by_y = tl.load(d_y + rows * HEAD_DIM + row[:, None] * HEAD_DIM + column[None, :])
    q0, q1, q2 = load_rows(C + keys, row, valid, D_STATE, STRIDE, PAIRS, PAIR_BLOCK, REST_BLOCK)
    decay = tl.load(log_decay + scalars + token)
    key = tl.load(key_log + scalars + token)
    gamma = tl.load(diagonal + scalars + token)
    ids = load_ids(document_ids, start, token, left)
    to_end = exp2(tl.load(log_decay + scalars + CHUNK - 1) - key, HARDWARE)
    if DOCUMENTS:
        to_end = tl.where(ids == load_ids(document_ids, start, CHUNK - 1, left), to_end, 0.0)

    k0, k1, k2 = rotate_rows(k0, k1, k2, None if B_bias is None else B_bias + head * (RANK * D_STATE), rank, cos, sin,
                             None, dtype, D_STATE, PAIRS, RANK, PAIR_BLOCK, REST_BLOCK)  # fmt: skip
    # [rows, N] @ [P, N]ᵀ -> [rows, P], from the state
    d_v = dot_over_state(k0, k1, k2, s0, s1, s2, PAIRS, D_STATE, PRECISION) * to_end[:, None]
    q0, q1, q2 = rotate_rows(q0, q1, q2, None if C_bias is None else C_bias + head * (RANK * D_STATE), rank, cos, sin,
                             None, dtype, D_STATE, PAIRS, RANK, PAIR_BLOCK, REST_BLOCK)  # fmt: skip
    # [rows, N] @ [rows, N]ᵀ and [rows, P] @ [rows, P]ᵀ -> [rows, rows]: keys in rows, queries in columns
    scores = dot_over_state(k0, k1, k2, q0, q1, q2, PAIRS, D_STATE, PRECISION)
    raw = v
    v = weigh_values(v, None if mimo_x is None else mimo_x + head * (RANK * HEAD_DIM), rank, RANK, HEAD_DIM)
    by_score = tl.dot(v, tl.trans(by_y), input_precision=PRECISION)
    same = tl.sum(tl.where(token[:, None] == token[None, :], scores * by_score, 0.0), axis=1)
    weight = pair_weights(decay[None, :], key[:, None], gamma[:, None], token[None, :], token[:, None], ids[None, :],
                          ids[:, None], DOCUMENTS, HARDWARE)  # fmt: skip
    scores = (scores * weight).to(dtype)
    by_score = (by_score * weight).to(dtype)
    # [rows, rows] @ [rows, P] -> [rows, P]
    d_v = tl.dot(scores, by_y, d_v, input_precision=PRECISION)
    at = tl.arange(0, CHUNK)
    tl.store(d_diagonal + scalars + at, tl.sum(tl.reshape(same, (CHUNK, RANK)), axis=1))
    if D is not None:
        d_v += tl.load(D + head).to(tl.float32) * by_y.to(tl.float32)
        tl.store(d_D + partial, tl.sum(tl.sum(by_y.to(tl.float32) * v.to(tl.float32), axis=1), axis=0))
    if mimo_x is not None:
        ranks = tl.arange(0, 16)[:, None]
        to = d_mimo_x + (partial * RANK + ranks) * HEAD_DIM + column[None, :]
        tl.store(to, sum_tokens(d_v * raw.to(tl.float32), rank, dtype, 16, PRECISION), mask=ranks < RANK)
        d_v *= load_per_rank(mimo_x + head * (RANK * HEAD_DIM), rank, RANK, HEAD_DIM)
    d_v = sum_ranks(d_v, CHUNK, RANK, HEAD_DIM)
    to = d_x + tokens + at[:, None] * (HEADS * HEAD_DIM) + column[None, :]
    tl.store(to, d_v.to(d_x.dtype.element_ty), mask=(at < left)[:, None])

    # [rows, P] @ [P, N] -> [rows, N], from the state; [rows, rows] @ [rows, N] -> [rows, N], from the chunk's queries
    d0, d1, d2 = zero_parts(ROWS, D_STATE, PAIRS, PAIR_BLOCK, REST_BLOCK)
    d0, d1, d2 = dot_into_state(v, s0, s1, s2, d0, d1, d2, PAIRS, D_STATE, PRECISION)
    d0, d1, d2 = scale_parts(d0, d1, d2, to_end[:, None], PAIRS, D_STATE)
    d0, d1, d2 = dot_into_state(by_score, q0, q1, q2, d0, d1, d2, PAIRS, D_STATE, PRECISION)
    by_decay, by_angle = rotation_gradients(k0, k1, k2, d0, d1, d2, PAIRS, D_STATE)
    tl.store(inner + scalars + at, tl.sum(tl.reshape(by_decay, (CHUNK, RANK)), axis=1))
    if PAIRS > 0:
        pair = tl.arange(0, PAIR_BLOCK)
        to = d_phase + scalars * PAIRS + at[:, None] * PAIRS + pair[None, :]
        known = (pair < PAIRS)[None, :] & (at >= 0)[:, None]
        tl.store(to, tl.load(to, mask=known, other=0.0) + sum_ranks(by_angle, CHUNK, RANK, PAIR_BLOCK), mask=known)
    d0, d1 = rotate_back(d0, d1, phase + scalars * PAIRS, token, PAIRS, PAIR_BLOCK, HARDWARE)
    store_parts(d_keys + rows * D_STATE, row, row >= 0, d0, d1, d2, D_STATE, PAIRS, PAIR_BLOCK, REST_BLOCK)
