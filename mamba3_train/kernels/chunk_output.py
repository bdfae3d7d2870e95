"""Outputs of each chunk from the state before it and from its own tokens, gated; and the gradients on the query side.

    y_t = Σ_{s ≤ t} w_ts (q_t · k_s) x_s + 2^log_decay_t S q_t + D x_t        (reference: `chunk_outputs`, `gate_and_merge`)

with w_ts of `pair_weights`; the diagonal needs no product of its own, because the rotation cancels in q_t · k_t. A chunk
of several tiles carries the state from tile to tile in registers. The backward recomputes y, because keeping it would
cost RANK times the memory of x.
"""

import triton
import triton.language as tl

from mamba3_train.kernels.gate import gate_rows, gate_rows_backward
from mamba3_train.kernels.tiles import (
    cast_parts,
    dot_into_state,
    dot_over_state,
    load_parts,
    load_per_rank,
    load_rotated,
    pair_weights,
    rotate_back,
    rotation_gradients,
    scale_parts,
    store_parts,
    sum_ranks,
    sum_tokens,
    zero_parts,
)


@triton.jit
def load_ids(document_ids, start, token, left):
    """Document of each token of a chunk, padding counted to the last one; 0 without documents."""
    ids = 0 * token
    if document_ids is not None:
        ids = tl.load(document_ids + start + tl.minimum(token, left - 1))
    return ids


@triton.jit
def load_values(x, mimo_x, token, valid, rank, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, RANK: tl.constexpr):
    """Rows of x, times mimo_x where there is one: (rows, P) in x's dtype."""
    column = tl.arange(0, HEAD_DIM)
    v = tl.load(x + token[:, None] * (HEADS * HEAD_DIM) + column[None, :], mask=valid[:, None], other=0.0)
    if mimo_x is not None:
        v = (v.to(tl.float32) * load_per_rank(mimo_x, rank, RANK, HEAD_DIM)).to(x.dtype.element_ty)
    return v


@triton.jit
def next_state(s0, s1, s2, v, k0, k1, k2, key_log, ids, decay_before, id_before, decay_end, id_end,
               PAIRS: tl.constexpr, D_STATE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The state at the end of a tile from the one before it, both in the frame of the chunk's start."""
    keep = tl.where(id_end == id_before, tl.exp2(decay_end - decay_before), 0.0)
    s0, s1, s2 = scale_parts(s0, s1, s2, keep, PAIRS, D_STATE)
    scale = tl.where(ids == id_end, tl.exp2(decay_end - key_log), 0.0)
    v = (v.to(tl.float32) * scale[:, None]).to(v.dtype)
    # [P, rows] @ [rows, N] -> [P, N]
    return dot_into_state(tl.trans(v), k0, k1, k2, s0, s1, s2, PAIRS, D_STATE, PRECISION)


@triton.jit(do_not_specialize=["seqlen", "chunks", "head_start"])
def chunk_outputs_kernel(
    x, B, C, B_bias, C_bias, D, z, mimo_x, mimo_z, mimo_o, norm_weight, document_ids, log_decay, key_log, diagonal,
    phase, states, out, norm_eps, seqlen, chunks, head_start,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, D_STATE: tl.constexpr, PAIRS: tl.constexpr,
    RANK: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, PAIR_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
    HEADS_HERE: tl.constexpr, PRECISION: tl.constexpr, HARDWARE_TRIG: tl.constexpr,
):  # fmt: skip
    """states: (batch, chunks + 1, HEADS_HERE, P, N), before each chunk; out: (batch, seqlen, HEADS, P)."""
    ROWS: tl.constexpr = TILE * RANK
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
    tokens = (start * HEADS + head) * HEAD_DIM
    bias = head * (RANK * D_STATE)
    weights = head * (RANK * HEAD_DIM)
    column = tl.arange(0, HEAD_DIM)
    slot = ((batch * (chunks + 1) + chunk) * HEADS_HERE + here) * (HEAD_DIM * D_STATE)
    s0, s1, s2 = load_parts(states + slot, column, column >= 0, D_STATE, PAIRS, PAIR_BLOCK, REST_BLOCK)
    if CHUNK > TILE:
        s0, s1, s2 = cast_parts(s0, s1, s2, tl.float32, PAIRS, D_STATE)
    decay_before = 0.0
    id_before = load_ids(document_ids, start, tl.maximum(-1, -chunk * CHUNK), left)

    for tile in range(CHUNK // TILE):
        row = tile * ROWS + tl.arange(0, ROWS)
        token = row // RANK
        rank = row % RANK
        valid = token < left
        ids = load_ids(document_ids, start, token, left)
        decay = tl.load(log_decay + scalars + token)
        key = tl.load(key_log + scalars + token)
        q0, q1, q2 = load_rotated(C + keys, None if C_bias is None else C_bias + bias, phase + scalars * PAIRS, row,
                                  token, rank, valid, None, dtype, D_STATE, STRIDE, PAIRS, RANK, PAIR_BLOCK,
                                  REST_BLOCK, HARDWARE_TRIG)  # fmt: skip
        k0, k1, k2 = load_rotated(B + keys, None if B_bias is None else B_bias + bias, phase + scalars * PAIRS, row,
                                  token, rank, valid, None, dtype, D_STATE, STRIDE, PAIRS, RANK, PAIR_BLOCK,
                                  REST_BLOCK, HARDWARE_TRIG)  # fmt: skip
        # [rows, N] @ [rows, N]ᵀ -> [rows, rows]
        scores = dot_over_state(q0, q1, q2, k0, k1, k2, PAIRS, D_STATE, PRECISION)
        gamma = tl.load(diagonal + scalars + token)
        scores *= pair_weights(decay[:, None], key[None, :], gamma[:, None], token[:, None], token[None, :],
                               ids[:, None], ids[None, :], DOCUMENTS)  # fmt: skip
        c0, c1, c2 = cast_parts(s0, s1, s2, dtype, PAIRS, D_STATE)
        # [rows, N] @ [P, N]ᵀ -> [rows, P]
        y = dot_over_state(q0, q1, q2, c0, c1, c2, PAIRS, D_STATE, PRECISION)
        y *= tl.where(ids == id_before, tl.exp2(decay - decay_before), 0.0)[:, None]
        v = load_values(x + tokens, None if mimo_x is None else mimo_x + weights, token, valid, rank, HEADS, HEAD_DIM,
                        RANK)  # fmt: skip
        # [rows, rows] @ [rows, P] -> [rows, P]
        y = tl.dot(scores.to(dtype), v, y, input_precision=PRECISION)
        if D is not None:
            y += tl.load(D + head).to(tl.float32) * v.to(tl.float32)
        y = gate_rows(y, None if z is None else z + tokens, None if mimo_z is None else mimo_z + weights,
                      None if mimo_o is None else mimo_o + weights,
                      None if norm_weight is None else norm_weight + head * HEAD_DIM, norm_eps,
                      token * (HEADS * HEAD_DIM), valid, rank, RANK, HEAD_DIM)  # fmt: skip
        to = tile * TILE + tl.arange(0, TILE)
        tl.store(out + tokens + to[:, None] * (HEADS * HEAD_DIM) + column[None, :],
                 sum_ranks(y, TILE, RANK, HEAD_DIM).to(out.dtype.element_ty), mask=(to < left)[:, None])  # fmt: skip
        if CHUNK > TILE:
            decay_end = tl.load(log_decay + scalars + tile * TILE + TILE - 1)
            id_end = load_ids(document_ids, start, tile * TILE + TILE - 1, left)
            s0, s1, s2 = next_state(s0, s1, s2, v, k0, k1, k2, key, ids, decay_before, id_before, decay_end, id_end,
                                    PAIRS, D_STATE, PRECISION)  # fmt: skip
            decay_before = decay_end
            id_before = id_end


@triton.jit(do_not_specialize=["seqlen", "chunks", "head_start"])
def chunk_outputs_backward_kernel(
    x, B, C, B_bias, C_bias, D, z, mimo_x, mimo_z, mimo_o, norm_weight, document_ids, log_decay, key_log, diagonal,
    phase, states, d_out, d_y, d_z, d_queries, d_phase, inner, d_mimo_z, d_mimo_o, d_norm, norm_eps, seqlen, chunks,
    head_start,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, D_STATE: tl.constexpr, PAIRS: tl.constexpr,
    RANK: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, PAIR_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
    HEADS_HERE: tl.constexpr, PRECISION: tl.constexpr, HARDWARE_TRIG: tl.constexpr,
):  # fmt: skip
    """Gradients of the rows y (before the gate), of z, and of the queries.

    d_y: (batch, HEADS_HERE, padded length · RANK, P); d_queries: (…, N), by C before rotation, of this head alone.
    d_phase: (batch, HEADS, padded length, PAIRS) and inner: (batch, HEADS, padded length), the queries' share of the
    gradient by phase and by log decay. d_mimo_z, d_mimo_o: (batch, chunks, HEADS, RANK, P), d_norm: (…, HEADS, P),
    one partial sum a chunk.
    """
    ROWS: tl.constexpr = TILE * RANK
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
    rows = ((batch * HEADS_HERE + here) * chunks + chunk) * (CHUNK * RANK)
    keys = start * (RANK * STRIDE) + head // (HEADS // GROUPS) * D_STATE
    tokens = (start * HEADS + head) * HEAD_DIM
    bias = head * (RANK * D_STATE)
    weights = head * (RANK * HEAD_DIM)
    partial = (batch * chunks + chunk) * HEADS + head
    column = tl.arange(0, HEAD_DIM)
    slot = ((batch * (chunks + 1) + chunk) * HEADS_HERE + here) * (HEAD_DIM * D_STATE)
    s0, s1, s2 = load_parts(states + slot, column, column >= 0, D_STATE, PAIRS, PAIR_BLOCK, REST_BLOCK)
    if CHUNK > TILE:
        s0, s1, s2 = cast_parts(s0, s1, s2, tl.float32, PAIRS, D_STATE)
    decay_before = 0.0
    id_before = load_ids(document_ids, start, tl.maximum(-1, -chunk * CHUNK), left)
    sum_mimo_z = tl.zeros((RANK, HEAD_DIM), tl.float32)
    sum_mimo_o = tl.zeros((RANK, HEAD_DIM), tl.float32)
    sum_norm = tl.zeros((HEAD_DIM,), tl.float32)

    for tile in range(CHUNK // TILE):
        row = tile * ROWS + tl.arange(0, ROWS)
        token = row // RANK
        rank = row % RANK
        valid = token < left
        ids = load_ids(document_ids, start, token, left)
        decay = tl.load(log_decay + scalars + token)
        key = tl.load(key_log + scalars + token)
        q0, q1, q2 = load_rotated(C + keys, None if C_bias is None else C_bias + bias, phase + scalars * PAIRS, row,
                                  token, rank, valid, None, dtype, D_STATE, STRIDE, PAIRS, RANK, PAIR_BLOCK,
                                  REST_BLOCK, HARDWARE_TRIG)  # fmt: skip
        k0, k1, k2 = load_rotated(B + keys, None if B_bias is None else B_bias + bias, phase + scalars * PAIRS, row,
                                  token, rank, valid, None, dtype, D_STATE, STRIDE, PAIRS, RANK, PAIR_BLOCK,
                                  REST_BLOCK, HARDWARE_TRIG)  # fmt: skip
        gamma = tl.load(diagonal + scalars + token)
        weight = pair_weights(decay[:, None], key[None, :], gamma[:, None], token[:, None], token[None, :],
                              ids[:, None], ids[None, :], DOCUMENTS)  # fmt: skip
        from_start = tl.where(ids == id_before, tl.exp2(decay - decay_before), 0.0)[:, None]
        c0, c1, c2 = cast_parts(s0, s1, s2, dtype, PAIRS, D_STATE)
        v = load_values(x + tokens, None if mimo_x is None else mimo_x + weights, token, valid, rank, HEADS, HEAD_DIM,
                        RANK)  # fmt: skip
        y = tl.zeros((ROWS, HEAD_DIM), tl.float32)
        if z is not None or mimo_o is not None or norm_weight is not None:  # else the output's gradient is y's
            scores = dot_over_state(q0, q1, q2, k0, k1, k2, PAIRS, D_STATE, PRECISION) * weight
            y = dot_over_state(q0, q1, q2, c0, c1, c2, PAIRS, D_STATE, PRECISION) * from_start
            y = tl.dot(scores.to(dtype), v, y, input_precision=PRECISION)
            if D is not None:
                y += tl.load(D + head).to(tl.float32) * v.to(tl.float32)
        by_out = tl.load(d_out + tokens + token[:, None] * (HEADS * HEAD_DIM) + column[None, :], mask=valid[:, None],
                         other=0.0).to(tl.float32)  # fmt: skip
        by_y, by_z, by_mimo_z, by_mimo_o, by_norm = gate_rows_backward(
            y, by_out, None if z is None else z + tokens, None if mimo_z is None else mimo_z + weights,
            None if mimo_o is None else mimo_o + weights,
            None if norm_weight is None else norm_weight + head * HEAD_DIM, norm_eps, token * (HEADS * HEAD_DIM), valid,
            rank, RANK, HEAD_DIM)  # fmt: skip
        narrow = by_y.to(dtype)
        tl.store(d_y + rows * HEAD_DIM + row[:, None] * HEAD_DIM + column[None, :], narrow)
        if z is not None:
            to = tile * TILE + tl.arange(0, TILE)
            tl.store(d_z + tokens + to[:, None] * (HEADS * HEAD_DIM) + column[None, :],
                     sum_ranks(by_z, TILE, RANK, HEAD_DIM).to(d_z.dtype.element_ty), mask=(to < left)[:, None])  # fmt: skip
            if mimo_z is not None:
                sum_mimo_z += sum_tokens(by_mimo_z, TILE, RANK, HEAD_DIM)
        if mimo_o is not None:
            sum_mimo_o += sum_tokens(by_mimo_o, TILE, RANK, HEAD_DIM)
        if norm_weight is not None:
            sum_norm += tl.sum(by_norm, axis=0)

        # [rows, P] @ [P, N] -> [rows, N], from the state; [rows, rows] @ [rows, N] -> [rows, N], from the tile's keys
        d0, d1, d2 = zero_parts(ROWS, D_STATE, PAIRS, PAIR_BLOCK, REST_BLOCK)
        d0, d1, d2 = dot_into_state(narrow, c0, c1, c2, d0, d1, d2, PAIRS, D_STATE, PRECISION)
        d0, d1, d2 = scale_parts(d0, d1, d2, from_start, PAIRS, D_STATE)
        by_score = (tl.dot(narrow, tl.trans(v), input_precision=PRECISION) * weight).to(dtype)
        d0, d1, d2 = dot_into_state(by_score, k0, k1, k2, d0, d1, d2, PAIRS, D_STATE, PRECISION)
        by_decay, by_angle = rotation_gradients(q0, q1, q2, d0, d1, d2, PAIRS, D_STATE)
        at = tile * TILE + tl.arange(0, TILE)
        tl.store(inner + scalars + at, tl.sum(tl.reshape(by_decay, (TILE, RANK)), axis=1))
        if PAIRS > 0:
            pair = tl.arange(0, PAIR_BLOCK)
            tl.store(d_phase + scalars * PAIRS + at[:, None] * PAIRS + pair[None, :],
                     sum_ranks(by_angle, TILE, RANK, PAIR_BLOCK), mask=(pair < PAIRS)[None, :] & (at >= 0)[:, None])  # fmt: skip
        d0, d1 = rotate_back(d0, d1, phase + scalars * PAIRS, token, PAIRS, PAIR_BLOCK, HARDWARE_TRIG)
        store_parts(d_queries + rows * D_STATE, row, row >= 0, d0, d1, d2, D_STATE, PAIRS, PAIR_BLOCK, REST_BLOCK)
        if CHUNK > TILE:
            decay_end = tl.load(log_decay + scalars + tile * TILE + TILE - 1)
            id_end = load_ids(document_ids, start, tile * TILE + TILE - 1, left)
            s0, s1, s2 = next_state(s0, s1, s2, v, k0, k1, k2, key, ids, decay_before, id_before, decay_end, id_end,
                                    PAIRS, D_STATE, PRECISION)  # fmt: skip
            decay_before = decay_end
            id_before = id_end

    rank_at = (partial * RANK + tl.arange(0, RANK))[:, None] * HEAD_DIM + column[None, :]
    if mimo_z is not None:
        tl.store(d_mimo_z + rank_at, sum_mimo_z)
    if mimo_o is not None:
        tl.store(d_mimo_o + rank_at, sum_mimo_o)
    if norm_weight is not None:
        tl.store(d_norm + partial * HEAD_DIM + column, sum_norm)
