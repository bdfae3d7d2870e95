"""Gradients on the key side of a chunk: x, B, D, mimo_x and the scales, from its own outputs and from the state at its end.

    dx_s = Σ_{t ≥ s} w_ts (k_s · q_t) dy_t + e_s dS k_s + D dy_s        e_s = 2^(total − key_log_s)
    dk_s = Σ_{t ≥ s} w_ts (x_s · dy_t) q_t + e_s dSᵀ x_s

A chunk of several tiles is walked from its last tile to its first, the gradient of the state carried in registers. The
transposed products (keys in rows) are computed as such: transposing a narrowed accumulator into the left operand of a
dot is miscompiled by Triton 3.4 to 3.7.0 on Hopper.
"""

import triton
import triton.language as tl

from mamba3_train.kernels.chunk_output import load_ids, load_values
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


@triton.jit(do_not_specialize=["seqlen", "chunks", "head_start"])
def chunk_keys_backward_kernel(
    x, B, C, B_bias, C_bias, D, mimo_x, document_ids, log_decay, key_log, diagonal, phase, d_states, d_y,
    d_x, d_keys, d_phase, inner, d_diagonal, d_D, d_mimo_x, seqlen, chunks, head_start,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, D_STATE: tl.constexpr, PAIRS: tl.constexpr,
    RANK: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, PAIR_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
    HEADS_HERE: tl.constexpr, PRECISION: tl.constexpr, HARDWARE_TRIG: tl.constexpr,
):  # fmt: skip
    """d_states: (batch, chunks, HEADS_HERE, P, N), of the state at each chunk's end; d_y as `chunk_outputs_backward`.

    d_keys: (batch, HEADS_HERE, padded length · RANK, N), by B before rotation, of this head alone. d_phase: the keys'
    share is added to the queries'. inner, d_diagonal: (batch, HEADS, padded length). d_D: (batch, chunks, HEADS) and
    d_mimo_x: (batch, chunks, HEADS, RANK, P), one partial sum a chunk.
    """
    ROWS: tl.constexpr = TILE * RANK
    TILES: tl.constexpr = CHUNK // TILE
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
    slot = ((batch * chunks + chunk) * HEADS_HERE + here) * (HEAD_DIM * D_STATE)
    s0, s1, s2 = load_parts(d_states + slot, column, column >= 0, D_STATE, PAIRS, PAIR_BLOCK, REST_BLOCK)
    if TILES > 1:
        s0, s1, s2 = cast_parts(s0, s1, s2, tl.float32, PAIRS, D_STATE)
    sum_mimo_x = tl.zeros((RANK, HEAD_DIM), tl.float32)
    sum_D = 0.0

    for i in range(TILES):
        tile = TILES - 1 - i
        row = tile * ROWS + tl.arange(0, ROWS)
        token = row // RANK
        rank = row % RANK
        valid = token < left
        ids = load_ids(document_ids, start, token, left)
        decay = tl.load(log_decay + scalars + token)
        key = tl.load(key_log + scalars + token)
        decay_end = tl.load(log_decay + scalars + tile * TILE + TILE - 1)
        id_end = load_ids(document_ids, start, tile * TILE + TILE - 1, left)
        k0, k1, k2 = load_rotated(B + keys, None if B_bias is None else B_bias + bias, phase + scalars * PAIRS, row,
                                  token, rank, valid, None, dtype, D_STATE, STRIDE, PAIRS, RANK, PAIR_BLOCK,
                                  REST_BLOCK, HARDWARE_TRIG)  # fmt: skip
        q0, q1, q2 = load_rotated(C + keys, None if C_bias is None else C_bias + bias, phase + scalars * PAIRS, row,
                                  token, rank, valid, None, dtype, D_STATE, STRIDE, PAIRS, RANK, PAIR_BLOCK,
                                  REST_BLOCK, HARDWARE_TRIG)  # fmt: skip
        v = load_values(x + tokens, None if mimo_x is None else mimo_x + weights, token, valid, rank, HEADS, HEAD_DIM,
                        RANK)  # fmt: skip
        by_y = tl.load(d_y + rows * HEAD_DIM + row[:, None] * HEAD_DIM + column[None, :])
        gamma = tl.load(diagonal + scalars + token)
        # Keys in rows, queries in columns.
        weight = pair_weights(decay[None, :], key[:, None], gamma[:, None], token[None, :], token[:, None],
                              ids[None, :], ids[:, None], DOCUMENTS)  # fmt: skip
        to_end = tl.where(ids == id_end, tl.exp2(decay_end - key), 0.0)[:, None]
        c0, c1, c2 = cast_parts(s0, s1, s2, dtype, PAIRS, D_STATE)

        # [rows, N] @ [rows, N]ᵀ -> [rows, rows]; [rows, P] @ [rows, P]ᵀ -> [rows, rows]
        scores = dot_over_state(k0, k1, k2, q0, q1, q2, PAIRS, D_STATE, PRECISION)
        by_score = tl.dot(v, tl.trans(by_y), input_precision=PRECISION)
        of_token = tl.sum(tl.where(token[:, None] == token[None, :], scores * by_score, 0.0), axis=1)
        at = tile * TILE + tl.arange(0, TILE)
        tl.store(d_diagonal + scalars + at, tl.sum(tl.reshape(of_token, (TILE, RANK)), axis=1))

        # [rows, N] @ [P, N]ᵀ -> [rows, P], then [rows, rows] @ [rows, P] -> [rows, P]
        d_v = dot_over_state(k0, k1, k2, c0, c1, c2, PAIRS, D_STATE, PRECISION) * to_end
        d_v = tl.dot((scores * weight).to(dtype), by_y, d_v, input_precision=PRECISION)
        if D is not None:
            d_v += tl.load(D + head).to(tl.float32) * by_y.to(tl.float32)
            sum_D += tl.sum(tl.sum(by_y.to(tl.float32) * v.to(tl.float32), axis=1), axis=0)
        if mimo_x is not None:
            raw = tl.load(x + tokens + token[:, None] * (HEADS * HEAD_DIM) + column[None, :], mask=valid[:, None],
                          other=0.0)  # fmt: skip
            sum_mimo_x += sum_tokens(d_v * raw.to(tl.float32), TILE, RANK, HEAD_DIM)
            d_v *= load_per_rank(mimo_x + weights, rank, RANK, HEAD_DIM)
        tl.store(d_x + tokens + at[:, None] * (HEADS * HEAD_DIM) + column[None, :],
                 sum_ranks(d_v, TILE, RANK, HEAD_DIM).to(d_x.dtype.element_ty), mask=(at < left)[:, None])  # fmt: skip

        # [rows, P] @ [P, N] -> [rows, N], then [rows, rows] @ [rows, N] -> [rows, N]
        d0, d1, d2 = zero_parts(ROWS, D_STATE, PAIRS, PAIR_BLOCK, REST_BLOCK)
        d0, d1, d2 = dot_into_state(v, c0, c1, c2, d0, d1, d2, PAIRS, D_STATE, PRECISION)
        d0, d1, d2 = scale_parts(d0, d1, d2, to_end, PAIRS, D_STATE)
        d0, d1, d2 = dot_into_state((by_score * weight).to(dtype), q0, q1, q2, d0, d1, d2, PAIRS, D_STATE, PRECISION)
        by_decay, by_angle = rotation_gradients(k0, k1, k2, d0, d1, d2, PAIRS, D_STATE)
        tl.store(inner + scalars + at, tl.sum(tl.reshape(by_decay, (TILE, RANK)), axis=1))
        if PAIRS > 0:
            pair = tl.arange(0, PAIR_BLOCK)
            to = d_phase + scalars * PAIRS + at[:, None] * PAIRS + pair[None, :]
            known = (pair < PAIRS)[None, :] & (at >= 0)[:, None]
            tl.store(to, tl.load(to, mask=known, other=0.0) + sum_ranks(by_angle, TILE, RANK, PAIR_BLOCK), mask=known)
        d0, d1 = rotate_back(d0, d1, phase + scalars * PAIRS, token, PAIRS, PAIR_BLOCK, HARDWARE_TRIG)
        store_parts(d_keys + rows * D_STATE, row, row >= 0, d0, d1, d2, D_STATE, PAIRS, PAIR_BLOCK, REST_BLOCK)

        if TILES > 1:  # the gradient of the state before this tile
            before = tl.maximum(tile * TILE - 1, 0)
            decay_before = tl.where(tile > 0, tl.load(log_decay + scalars + before), 0.0)
            id_before = load_ids(document_ids, start, before, left)
            s0, s1, s2 = state_gradient_before(s0, s1, s2, by_y, q0, q1, q2, decay, ids, decay_before, id_before,
                                               decay_end, id_end, PAIRS, D_STATE, PRECISION)  # fmt: skip
    if D is not None:
        tl.store(d_D + partial, sum_D)
    if mimo_x is not None:
        to = d_mimo_x + (partial * RANK + tl.arange(0, RANK))[:, None] * HEAD_DIM + column[None, :]
        tl.store(to, sum_mimo_x)


@triton.jit
def state_gradient_before(s0, s1, s2, by_y, q0, q1, q2, log_decay, ids, decay_before, id_before, decay_end, id_end,
                          PAIRS: tl.constexpr, D_STATE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Gradient of the state before a tile, from that of the state at its end and the tile's outputs."""
    keep = tl.where(id_end == id_before, tl.exp2(decay_end - decay_before), 0.0)
    s0, s1, s2 = scale_parts(s0, s1, s2, keep, PAIRS, D_STATE)
    scale = tl.where(ids == id_before, tl.exp2(log_decay - decay_before), 0.0)
    by_y = (by_y.to(tl.float32) * scale[:, None]).to(by_y.dtype)
    # [P, rows] @ [rows, N] -> [P, N]
    return dot_into_state(tl.trans(by_y), q0, q1, q2, s0, s1, s2, PAIRS, D_STATE, PRECISION)
