"""Gradients on the query side of a chunk: C, scales, and its share of the gradient of the state before it.

dq_t = Σ_{s ≤ t} w_ts (dy_t · x_s) k_s + 2^log_decay_t Sᵀ dy_t          d_local = Σ_t 2^log_decay_t dy_t q_tᵀ
"""

import triton
import triton.language as tl

from mamba3_train.kernels.tiles import (
    dot_into_state,
    exp2,
    load_ids,
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
    weigh_values,
    zero_parts,
)


@triton.jit(do_not_specialize=["seqlen", "chunks", "head_start", "heads_here"])
def chunk_queries_backward_kernel(
    x, B, C, B_bias, C_bias, mimo_x, document_ids, log_decay, key_log, diagonal, phase, states, d_y,
    d_local, d_queries, d_phase, inner, seqlen, chunks, head_start, heads_here,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, D_STATE: tl.constexpr, PAIRS: tl.constexpr,
    RANK: tl.constexpr, CHUNK: tl.constexpr, PAIR_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """d_y: (batch, heads_here, padded length · RANK, P); d_queries: (…, N), by C before rotation, of this head alone.

    d_local: (batch, chunks, heads_here, P, N). d_phase: (batch, HEADS, padded length, PAIRS) and inner: (batch, HEADS,
    padded length), the queries' share of the gradient by phase and by log decay.
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
    slot = ((batch * (chunks + 1) + chunk) * heads_here + here) * (HEAD_DIM * D_STATE)
    local = ((batch * chunks + chunk) * heads_here + here) * (HEAD_DIM * D_STATE)
    row = tl.arange(0, ROWS)
    token = row // RANK
    rank = row % RANK
    valid = token < left
    column = tl.arange(0, HEAD_DIM)

    # Loads first: a dot's barriers keep later loads from being issued early.
    by_y = tl.load(d_y + rows * HEAD_DIM + row[:, None] * HEAD_DIM + column[None, :])
    q0, q1, q2 = load_rows(C + keys, row, valid, D_STATE, STRIDE, PAIRS, PAIR_BLOCK, REST_BLOCK)
    cos, sin = load_turn(phase + scalars * PAIRS, token, PAIRS, PAIR_BLOCK, HARDWARE)
    s0, s1, s2 = load_rows(states + slot, column, column >= 0, D_STATE, D_STATE, PAIRS, PAIR_BLOCK, REST_BLOCK)
    v = load_tokens(x + (start * HEADS + head) * HEAD_DIM, token, valid, HEADS, HEAD_DIM)
    k0, k1, k2 = load_rows(B + keys, row, valid, D_STATE, STRIDE, PAIRS, PAIR_BLOCK, REST_BLOCK)
    decay = tl.load(log_decay + scalars + token)
    key = tl.load(key_log + scalars + token)
    gamma = tl.load(diagonal + scalars + token)
    ids = load_ids(document_ids, start, token, left)
    from_start = exp2(decay, HARDWARE)
    if DOCUMENTS:
        from_start = tl.where(
            ids == load_ids(document_ids, start, tl.maximum(-1, -chunk * CHUNK), left), from_start, 0.0
        )
    k0, k1, k2 = rotate_rows(k0, k1, k2, None if B_bias is None else B_bias + head * (RANK * D_STATE), rank, cos, sin,
                             None, dtype, D_STATE, PAIRS, RANK, PAIR_BLOCK, REST_BLOCK)  # fmt: skip
    # Loaded again rather than transposed: see `chunk_states_kernel`.
    scaled = tl.load(d_y + rows * HEAD_DIM + row[None, :] * HEAD_DIM + column[:, None])
    scaled = (scaled.to(tl.float32) * from_start[None, :]).to(dtype)

    q0, q1, q2 = rotate_rows(q0, q1, q2, None if C_bias is None else C_bias + head * (RANK * D_STATE), rank, cos, sin,
                             None, dtype, D_STATE, PAIRS, RANK, PAIR_BLOCK, REST_BLOCK)  # fmt: skip
    # [P, rows] @ [rows, N] -> [P, N]
    l0, l1, l2 = zero_parts(HEAD_DIM, D_STATE, PAIRS, PAIR_BLOCK, REST_BLOCK)
    l0, l1, l2 = dot_into_state(scaled, q0, q1, q2, l0, l1, l2, PAIRS, D_STATE, PRECISION)
    store_parts(d_local + local, column, column >= 0, l0, l1, l2, D_STATE, PAIRS, PAIR_BLOCK, REST_BLOCK)

    # [rows, P] @ [P, N] -> [rows, N], from the state
    d0, d1, d2 = zero_parts(ROWS, D_STATE, PAIRS, PAIR_BLOCK, REST_BLOCK)
    d0, d1, d2 = dot_into_state(by_y, s0, s1, s2, d0, d1, d2, PAIRS, D_STATE, PRECISION)
    d0, d1, d2 = scale_parts(d0, d1, d2, from_start[:, None], PAIRS, D_STATE)
    # [rows, P] @ [rows, P]ᵀ -> [rows, rows]; [rows, rows] @ [rows, N] -> [rows, N], from the chunk's keys
    v = weigh_values(v, None if mimo_x is None else mimo_x + head * (RANK * HEAD_DIM), rank, RANK, HEAD_DIM)
    by_score = tl.dot(by_y, tl.trans(v), input_precision=PRECISION)
    by_score *= pair_weights(decay[:, None], key[None, :], gamma[:, None], token[:, None], token[None, :], ids[:, None],
                             ids[None, :], DOCUMENTS, HARDWARE)  # fmt: skip
    d0, d1, d2 = dot_into_state(by_score.to(dtype), k0, k1, k2, d0, d1, d2, PAIRS, D_STATE, PRECISION)

    by_decay, by_angle = rotation_gradients(q0, q1, q2, d0, d1, d2, PAIRS, D_STATE)
    at = tl.arange(0, CHUNK)
    tl.store(inner + scalars + at, tl.sum(tl.reshape(by_decay, (CHUNK, RANK)), axis=1))
    if PAIRS > 0:
        pair = tl.arange(0, PAIR_BLOCK)
        to = d_phase + scalars * PAIRS + at[:, None] * PAIRS + pair[None, :]
        tl.store(to, sum_ranks(by_angle, CHUNK, RANK, PAIR_BLOCK), mask=(pair < PAIRS)[None, :] & (at >= 0)[:, None])
    d0, d1 = rotate_back(d0, d1, phase + scalars * PAIRS, token, PAIRS, PAIR_BLOCK, HARDWARE)
    store_parts(d_queries + rows * D_STATE, row, row >= 0, d0, d1, d2, D_STATE, PAIRS, PAIR_BLOCK, REST_BLOCK)
