"""Gradients on the query side of a chunk: C, scales, and its share of the gradient of the state before it.

dq_t = Σ_{s ≤ t} w_ts (dy_t · x_s) k_s + 2^log_decay_t Sᵀ dy_t          d_local = Σ_t 2^log_decay_t dy_t q_tᵀ
"""

import triton
import triton.language as tl

from mamba3_train.kernels.tiles import (
    dot_into_state,
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
    rotate_back,
    rotate_rows,
    rotation_gradients,
    scale_parts,
    store_parts,
    sum_ranks,
    turn_of,
    weigh_pairs,
    weigh_values,
    zero_parts,
)


@triton.jit(do_not_specialize=["seqlen", "chunks", "head_start"])
def chunk_queries_backward_kernel(
    x, B, C, B_bias, C_bias, mimo_x, document_ids, log_decay, key_log, diagonal, phase, states, d_y,
    d_local, d_queries, d_phase, inner, seqlen, chunks, head_start,
    HEADS: tl.constexpr, HEADS_HERE: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, D_STATE: tl.constexpr,
    PAIRS: tl.constexpr, RANK: tl.constexpr, CHUNK: tl.constexpr, PAIR_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, HARDWARE: tl.constexpr, TOKEN_STRIDE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """d_y: (batch, HEADS_HERE, padded length · RANK, P); d_queries: (…, N), by C before rotation, of this head alone.

    d_local: (batch, chunks, HEADS_HERE, P, N). d_phase: (batch, HEADS_HERE, padded length, PAIRS) and inner: (batch,
    HEADS, padded length), the queries' share of the gradient by phase and by log decay.
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
    slot = ((batch * (chunks + 1) + chunk) * HEADS_HERE + here) * (HEAD_DIM * D_STATE)
    local = ((batch * chunks + chunk) * HEADS_HERE + here) * (HEAD_DIM * D_STATE)
    row = tl.arange(0, ROWS)
    valid = row // RANK < left
    token = tl.arange(0, CHUNK)
    column = tl.arange(0, HEAD_DIM)
    MIMO: tl.constexpr = mimo_x is not None
    at_y = d_y + rows * HEAD_DIM

    # All loads are issued before the first is held: see `hold`.
    q0, q1, q2 = load_rows(C + keys, row, valid, D_STATE, STRIDE, PAIRS, PAIR_BLOCK, REST_BLOCK)
    fraction = load_phase(phase + scalars * PAIRS, PAIRS, CHUNK, PAIR_BLOCK)
    # Loaded twice rather than transposed: see `chunk_states_kernel`.
    scaled = tl.load(at_y + row[None, :] * HEAD_DIM + column[:, None])
    by_y = tl.load(at_y + row[:, None] * HEAD_DIM + column[None, :])
    s0, s1, s2 = load_rows(states + slot, column, column >= 0, D_STATE, D_STATE, PAIRS, PAIR_BLOCK, REST_BLOCK)
    v = load_tokens(x + start * TOKEN_STRIDE + head * HEAD_DIM, left, CHUNK, TOKEN_STRIDE, HEAD_DIM)
    k0, k1, k2 = load_rows(B + keys, row, valid, D_STATE, STRIDE, PAIRS, PAIR_BLOCK, REST_BLOCK)
    decay = tl.load(log_decay + scalars + row // RANK)
    decay_t = tl.load(log_decay + scalars + token)
    key_t = tl.load(key_log + scalars + token)
    gamma_t = tl.load(diagonal + scalars + token)
    c0, c1, c2 = load_bias(C_bias, head, D_STATE, PAIRS, RANK, PAIR_BLOCK, REST_BLOCK)
    b0, b1, b2 = load_bias(B_bias, head, D_STATE, PAIRS, RANK, PAIR_BLOCK, REST_BLOCK)
    if AHEAD > 0:
        fetch_chunk_ahead(
            states, d_y, phase, x, None, seqlen, chunks, head_start, chunks + 1,
            HEADS, HEADS_HERE, HEAD_DIM, D_STATE, PAIRS, RANK, CHUNK, TOKEN_STRIDE, AHEAD,
        )  # fmt: skip
    q0, q1, q2 = hold_parts(q0, q1, q2, PAIRS, D_STATE, HARDWARE)
    cos, sin = turn_of(fraction, PAIRS, HARDWARE)
    scaled = hold(scaled, HARDWARE)
    by_y = hold(by_y, HARDWARE)
    s0, s1, s2 = hold_parts(s0, s1, s2, PAIRS, D_STATE, HARDWARE)
    v = hold(v, HARDWARE)
    k0, k1, k2 = hold_parts(k0, k1, k2, PAIRS, D_STATE, HARDWARE)

    ids = load_ids(document_ids, start, token, left)
    from_start = exp2(decay, HARDWARE)
    if DOCUMENTS:
        running = load_ids(document_ids, start, tl.maximum(-1, -chunk * CHUNK), left)
        from_start = tl.where(load_ids(document_ids, start, row // RANK, left) == running, from_start, 0.0)
    k0, k1, k2 = rotate_rows(k0, k1, k2, b0, b1, b2, cos, sin, None, B_bias is not None, dtype, PAIRS, D_STATE, CHUNK,
                             RANK)  # fmt: skip
    scaled = (scaled.to(tl.float32) * from_start[None, :]).to(dtype)
    q0, q1, q2 = rotate_rows(q0, q1, q2, c0, c1, c2, cos, sin, None, C_bias is not None, dtype, PAIRS, D_STATE, CHUNK,
                             RANK)  # fmt: skip
    # [P, rows] @ [rows, N] -> [P, N]
    l0, l1, l2 = zero_parts(HEAD_DIM, D_STATE, PAIRS, PAIR_BLOCK, REST_BLOCK)
    l0, l1, l2 = dot_into_state(scaled, q0, q1, q2, l0, l1, l2, PAIRS, D_STATE, PRECISION)
    store_parts(d_local + local, column, column >= 0, l0, l1, l2, D_STATE, PAIRS, PAIR_BLOCK, REST_BLOCK)

    # [rows, P] @ [P, N] -> [rows, N], from the state
    d0, d1, d2 = zero_parts(ROWS, D_STATE, PAIRS, PAIR_BLOCK, REST_BLOCK)
    d0, d1, d2 = dot_into_state(by_y, s0, s1, s2, d0, d1, d2, PAIRS, D_STATE, PRECISION)
    d0, d1, d2 = scale_parts(d0, d1, d2, from_start[:, None], PAIRS, D_STATE)
    # [rows, P] @ [rows, P]ᵀ -> [rows, rows]; [rows, rows] @ [rows, N] -> [rows, N], from the chunk's keys
    v = weigh_values(v, load_ranks(mimo_x, head, RANK, HEAD_DIM) if MIMO else None, MIMO, CHUNK, RANK)
    by_score = tl.dot(by_y, tl.trans(v), input_precision=PRECISION)
    by_score = weigh_pairs(by_score, decay_t[:, None], key_t[None, :], gamma_t[:, None], token[:, None],
                           token[None, :], ids[:, None], ids[None, :], DOCUMENTS, HARDWARE, CHUNK, RANK)  # fmt: skip
    fraction = load_phase(phase + scalars * PAIRS, PAIRS, CHUNK, PAIR_BLOCK)  # again: fewer registers
    d0, d1, d2 = dot_into_state(by_score.to(dtype), k0, k1, k2, d0, d1, d2, PAIRS, D_STATE, PRECISION)

    by_decay, by_angle = rotation_gradients(q0, q1, q2, d0, d1, d2, PAIRS, D_STATE)
    tl.store(inner + scalars + token, sum_ranks(by_decay, CHUNK, RANK))
    if PAIRS > 0:
        pair = tl.arange(0, PAIR_BLOCK)
        to = d_phase + rows // RANK * PAIRS + token[:, None] * PAIRS + pair[None, :]
        tl.store(to, sum_ranks(by_angle, CHUNK, RANK), mask=(pair < PAIRS)[None, :] & (token >= 0)[:, None])
    cos, sin = turn_of(fraction, PAIRS, HARDWARE)
    d0, d1 = rotate_back(d0, d1, cos, sin, PAIRS, CHUNK, RANK)
    store_parts(d_queries + rows * D_STATE, row, row >= 0, d0, d1, d2, D_STATE, PAIRS, PAIR_BLOCK, REST_BLOCK)
