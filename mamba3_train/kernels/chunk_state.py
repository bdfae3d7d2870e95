"""What each chunk adds to the state at its end: one product of scaled rows (reference: `chunk_states`).

    local_c = Σ_s 2^(total − key_log_s) x_s k_sᵀ

With documents only the last document's keys reach the chunk's end.
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
    load_rows,
    rotate_rows,
    store_parts,
    turn_of,
    zero_parts,
)


@triton.jit(do_not_specialize=["seqlen", "chunks", "head_start"])
def chunk_states_kernel(
    x, mimo_x, B, B_bias, document_ids, log_decay, key_log, phase, states, seqlen, chunks, head_start,
    HEADS: tl.constexpr, HEADS_HERE: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, D_STATE: tl.constexpr,
    PAIRS: tl.constexpr, RANK: tl.constexpr, CHUNK: tl.constexpr, PAIR_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, HARDWARE: tl.constexpr, TOKEN_STRIDE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """states: (batch, chunks, HEADS_HERE, P, N)."""
    ROWS: tl.constexpr = CHUNK * RANK
    STRIDE: tl.constexpr = GROUPS * D_STATE
    chunk = tl.program_id(0) // HEADS_HERE
    here = tl.program_id(0) % HEADS_HERE
    batch = tl.program_id(1).to(tl.int64)
    head = head_start + here
    start = batch * seqlen + chunk * CHUNK
    left = seqlen - chunk * CHUNK
    scalars = (batch * HEADS + head) * chunks * CHUNK + chunk * CHUNK
    keys = B + start * (RANK * STRIDE) + head // (HEADS // GROUPS) * D_STATE
    row = tl.arange(0, ROWS)
    token = tl.arange(0, CHUNK)
    BIAS: tl.constexpr = B_bias is not None

    # All loads are issued before the first is held: see `hold`.
    k0, k1, k2 = load_rows(keys, row, row // RANK < left, D_STATE, STRIDE, PAIRS, PAIR_BLOCK, REST_BLOCK)
    # x is loaded transposed: Triton 3.6 on Hopper gives wrong products and illegal addresses where a computed tile, not
    # one straight from memory, is transposed into the left operand of a dot.
    column = tl.arange(0, HEAD_DIM)[:, None]
    tokens = x + start * TOKEN_STRIDE + head * HEAD_DIM
    v = tl.load(tokens + token[None, :] * TOKEN_STRIDE + column, mask=token[None, :] < left, other=0.0)
    fraction = load_phase(phase + scalars * PAIRS, PAIRS, CHUNK, PAIR_BLOCK)
    b0, b1, b2 = load_bias(B_bias, head, D_STATE, PAIRS, RANK, PAIR_BLOCK, REST_BLOCK)
    if mimo_x is not None:
        weight = tl.load(mimo_x + head * (RANK * HEAD_DIM) + tl.arange(0, RANK)[None, :] * HEAD_DIM + column)
    total = tl.load(log_decay + scalars + CHUNK - 1)
    key = tl.load(key_log + scalars + token)
    if AHEAD > 0:
        fetch_chunk_ahead(
            None, None, phase, x, None, seqlen, chunks, head_start, chunks,
            HEADS, HEADS_HERE, HEAD_DIM, D_STATE, PAIRS, RANK, CHUNK, TOKEN_STRIDE, AHEAD,
        )  # fmt: skip
    k0, k1, k2 = hold_parts(k0, k1, k2, PAIRS, D_STATE, HARDWARE)
    v = hold(v, HARDWARE)
    cos, sin = turn_of(fraction, PAIRS, HARDWARE)
    scale = exp2(total - key, HARDWARE)
    if document_ids is not None:
        ids = load_ids(document_ids, start, token, left)
        scale = tl.where(ids == load_ids(document_ids, start, CHUNK - 1, left), scale, 0.0)

    if mimo_x is not None:
        v = (v.to(tl.float32)[:, :, None] * weight.to(tl.float32)[:, None, :]).to(x.dtype.element_ty)
        v = tl.reshape(v, (HEAD_DIM, ROWS))
    k0, k1, k2 = rotate_rows(k0, k1, k2, b0, b1, b2, cos, sin, scale, BIAS, x.dtype.element_ty, PAIRS, D_STATE, CHUNK,
                             RANK)  # fmt: skip
    # [P, rows] @ [rows, N] -> [P, N]
    s0, s1, s2 = zero_parts(HEAD_DIM, D_STATE, PAIRS, PAIR_BLOCK, REST_BLOCK)
    s0, s1, s2 = dot_into_state(v, k0, k1, k2, s0, s1, s2, PAIRS, D_STATE, PRECISION)
    slot = ((batch * chunks + chunk) * HEADS_HERE + here) * (HEAD_DIM * D_STATE)
    column = tl.arange(0, HEAD_DIM)
    store_parts(states + slot, column, column >= 0, s0, s1, s2, D_STATE, PAIRS, PAIR_BLOCK, REST_BLOCK)
