"""What each chunk adds to the state at its end: one product of scaled rows (reference: `chunk_states`).

    local_c = Σ_s 2^(total − key_log_s) x_s k_sᵀ

With documents only the last document's keys reach the chunk's end.
"""

import triton
import triton.language as tl

from mamba3_train.kernels.tiles import (
    dot_into_state,
    exp2,
    load_ids,
    load_rows,
    load_turn,
    rotate_rows,
    store_parts,
    zero_parts,
)


@triton.jit(do_not_specialize=["seqlen", "chunks", "head_start", "heads_here"])
def chunk_states_kernel(
    x, mimo_x, B, B_bias, document_ids, log_decay, key_log, phase, states, seqlen, chunks, head_start, heads_here,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, D_STATE: tl.constexpr, PAIRS: tl.constexpr,
    RANK: tl.constexpr, CHUNK: tl.constexpr, PAIR_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """states: (batch, chunks, heads_here, P, N)."""
    ROWS: tl.constexpr = CHUNK * RANK
    STRIDE: tl.constexpr = GROUPS * D_STATE
    chunk = tl.program_id(0) // heads_here
    here = tl.program_id(0) % heads_here
    batch = tl.program_id(1).to(tl.int64)
    head = head_start + here
    start = batch * seqlen + chunk * CHUNK
    left = seqlen - chunk * CHUNK
    scalars = (batch * HEADS + head) * chunks * CHUNK + chunk * CHUNK
    keys = B + start * (RANK * STRIDE) + head // (HEADS // GROUPS) * D_STATE
    row = tl.arange(0, ROWS)
    token = row // RANK
    rank = row % RANK
    valid = token < left

    k0, k1, k2 = load_rows(keys, row, valid, D_STATE, STRIDE, PAIRS, PAIR_BLOCK, REST_BLOCK)
    # x is loaded transposed: Triton 3.6 on Hopper gives wrong products and illegal addresses where a computed tile, not
    # one straight from memory, is transposed into the left operand of a dot.
    column = tl.arange(0, HEAD_DIM)
    tokens = x + (start * HEADS + head) * HEAD_DIM
    v = tl.load(tokens + token[None, :] * (HEADS * HEAD_DIM) + column[:, None], mask=valid[None, :], other=0.0)
    cos, sin = load_turn(phase + scalars * PAIRS, token, PAIRS, PAIR_BLOCK, HARDWARE)
    scale = exp2(tl.load(log_decay + scalars + CHUNK - 1) - tl.load(key_log + scalars + token), HARDWARE)
    if document_ids is not None:
        ids = load_ids(document_ids, start, token, left)
        scale = tl.where(ids == load_ids(document_ids, start, CHUNK - 1, left), scale, 0.0)
    if mimo_x is not None:
        weight = tl.load(mimo_x + head * (RANK * HEAD_DIM) + rank[None, :] * HEAD_DIM + column[:, None])
        v = (v.to(tl.float32) * weight.to(tl.float32)).to(x.dtype.element_ty)
    k0, k1, k2 = rotate_rows(k0, k1, k2, None if B_bias is None else B_bias + head * (RANK * D_STATE), rank, cos, sin,
                             scale, x.dtype.element_ty, D_STATE, PAIRS, RANK, PAIR_BLOCK, REST_BLOCK)  # fmt: skip
    # [P, rows] @ [rows, N] -> [P, N]
    s0, s1, s2 = zero_parts(HEAD_DIM, D_STATE, PAIRS, PAIR_BLOCK, REST_BLOCK)
    s0, s1, s2 = dot_into_state(v, k0, k1, k2, s0, s1, s2, PAIRS, D_STATE, PRECISION)
    slot = ((batch * chunks + chunk) * heads_here + here) * (HEAD_DIM * D_STATE)
    store_parts(states + slot, column, column >= 0, s0, s1, s2, D_STATE, PAIRS, PAIR_BLOCK, REST_BLOCK)
