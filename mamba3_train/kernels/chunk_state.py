"""What each chunk adds to the state at its end, and, mirrored, what its outputs add to the gradient of the one before.

    local_c = Σ_s 2^(total − key_log_s) x_s k_sᵀ          d_local_c = Σ_t 2^(log_decay_t) dy_t q_tᵀ

Both are one product [P, rows] @ [rows, N] of scaled rows (reference: `chunk_states`). With documents only the last
document's keys reach the chunk's end, and only the first document's queries saw the state before it.
"""

import triton
import triton.language as tl

from mamba3_train.kernels.tiles import dot_into_state, load_per_rank, load_rotated, store_parts, zero_parts


@triton.jit(do_not_specialize=["seqlen", "chunks", "head_start"])
def chunk_states_kernel(
    values, mimo_x, vectors, bias, document_ids, log_decay, key_log, phase, states, seqlen, chunks, head_start,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, D_STATE: tl.constexpr, PAIRS: tl.constexpr,
    RANK: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, PAIR_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
    HEADS_HERE: tl.constexpr, BACKWARD: tl.constexpr, PRECISION: tl.constexpr, HARDWARE_TRIG: tl.constexpr,
):  # fmt: skip
    """states: (batch, chunks, HEADS_HERE, P, N).

    Forward: values are x (batch, seqlen, HEADS, P), vectors B. Backward: values are the output gradients
    (batch, HEADS_HERE, padded length · RANK, P) and vectors C.
    """
    ROWS: tl.constexpr = TILE * RANK
    STRIDE: tl.constexpr = GROUPS * D_STATE
    chunk = tl.program_id(0) // HEADS_HERE
    here = tl.program_id(0) % HEADS_HERE
    batch = tl.program_id(1).to(tl.int64)
    head = head_start + here
    start = batch * seqlen + chunk * CHUNK
    scalars = (batch * HEADS + head) * chunks * CHUNK + chunk * CHUNK
    vectors += start * (RANK * STRIDE) + head // (HEADS // GROUPS) * D_STATE
    if bias is not None:
        bias += head * (RANK * D_STATE)
    phase += scalars * PAIRS
    if BACKWARD:
        values += ((batch * HEADS_HERE + here) * chunks + chunk) * (CHUNK * RANK * HEAD_DIM)
    else:
        values += (start * HEADS + head) * HEAD_DIM
    dtype: tl.constexpr = values.dtype.element_ty
    column = tl.arange(0, HEAD_DIM)
    left = seqlen - chunk * CHUNK
    if BACKWARD:
        border = tl.maximum(-1, -chunk * CHUNK)  # the token before the chunk, or the first of all
    else:
        border = tl.minimum(CHUNK, left) - 1
        total = tl.load(log_decay + scalars + CHUNK - 1)

    s0, s1, s2 = zero_parts(HEAD_DIM, D_STATE, PAIRS, PAIR_BLOCK, REST_BLOCK)
    for tile in range(CHUNK // TILE):
        row = tile * ROWS + tl.arange(0, ROWS)
        token = row // RANK
        rank = row % RANK
        valid = token < left
        if BACKWARD:
            scale = tl.exp2(tl.load(log_decay + scalars + token))
            v = tl.load(values + row[:, None] * HEAD_DIM + column[None, :])
        else:
            scale = tl.exp2(total - tl.load(key_log + scalars + token))
            v = tl.load(values + token[:, None] * (HEADS * HEAD_DIM) + column[None, :], mask=valid[:, None], other=0.0)
            if mimo_x is not None:
                weight = load_per_rank(mimo_x + head * (RANK * HEAD_DIM), rank, RANK, HEAD_DIM)
                v = (v.to(tl.float32) * weight).to(dtype)
        if document_ids is not None:
            ids = tl.load(document_ids + start + tl.minimum(token, left - 1))
            scale = tl.where(ids == tl.load(document_ids + start + border), scale, 0.0)
        k0, k1, k2 = load_rotated(vectors, bias, phase, row, token, rank, valid, scale, dtype, D_STATE, STRIDE, PAIRS,
                                  RANK, PAIR_BLOCK, REST_BLOCK, HARDWARE_TRIG)  # fmt: skip
        # [P, rows] @ [rows, N] -> [P, N]
        s0, s1, s2 = dot_into_state(tl.trans(v), k0, k1, k2, s0, s1, s2, PAIRS, D_STATE, PRECISION)
    slot = ((batch * chunks + chunk) * HEADS_HERE + here) * (HEAD_DIM * D_STATE)
    store_parts(states + slot, column, column >= 0, s0, s1, s2, D_STATE, PAIRS, PAIR_BLOCK, REST_BLOCK)
