"""From the output's gradient to y's, z's and the gate's weights', and on to the query side of a chunk, on Hopper.

What `kernels/chunk_output.py` (backward) and `kernels/chunk_query.py` compute, in one: B, C and the state are loaded
and turned once, and y's gradient is used where it arises.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mamba3_train.kernels.hopper.chunk_output import chunk_outputs
from mamba3_train.kernels.hopper.gate import gate_rows_backward
from mamba3_train.kernels.hopper.layouts import accumulator_layout, neighbour_layout, product_layout
from mamba3_train.kernels.hopper.memory import (
    by_row,
    load_by_token,
    place_of_program,
    read_by_rank,
    read_by_token,
    share,
    store_ranks,
    store_rows,
    store_tokens,
    widened,
)
from mamba3_train.kernels.hopper.tiles import (
    dot_from_state,
    dot_onto_state,
    rotation_gradients,
    sum_of_tokens,
    weigh,
)


@gluon.jit(do_not_specialize=["seqlen", "chunks", "head_start"])
def hopper_chunk_queries_backward_kernel(
    x, B, C, B_bias, C_bias, D, z, mimo_x, mimo_z, mimo_o, norm_weight, document_ids, log_decay, key_log, diagonal,
    phase, states, kept_y, d_out, d_y, d_z, d_mimo_z, d_mimo_o, d_norm, d_queries, d_phase, inner, norm_eps, seqlen,
    chunks, head_start,
    HEADS: gl.constexpr, HEADS_HERE: gl.constexpr, GROUPS: gl.constexpr, HEAD_DIM: gl.constexpr,
    D_STATE: gl.constexpr, PAIRS: gl.constexpr, RANK: gl.constexpr, CHUNK: gl.constexpr,
    TOKEN_STRIDE: gl.constexpr, AHEAD: gl.constexpr, STATE_HEADS: gl.constexpr,
):  # fmt: skip
    """Shapes as in the two kernels that this one stands for, but states as in `hopper_chunk_outputs_kernel`."""
    STRIDE: gl.constexpr = GROUPS * D_STATE
    REST: gl.constexpr = D_STATE - 2 * PAIRS
    PARTS: gl.constexpr = 3 if REST > 0 else 2
    dtype: gl.constexpr = x.dtype.element_ty
    valued: gl.constexpr = accumulator_layout(HEAD_DIM, RANK)
    turned: gl.constexpr = neighbour_layout(PAIRS, RANK)
    chunk, here, batch, head, start, left, scalars, keys = place_of_program(
        seqlen, chunks, head_start, HEADS, HEADS_HERE, GROUPS, D_STATE, RANK, CHUNK
    )
    rows = ((batch * HEADS_HERE + here) * chunks + chunk) * (CHUNK * RANK)
    tokens = start * TOKEN_STRIDE + head * HEAD_DIM
    packed = (start * HEADS + head) * HEAD_DIM
    ids = None if document_ids is None else document_ids + start
    if kept_y is not None:
        kept_y += scalars * (RANK * HEAD_DIM)

    y, tiles, weight, from_start, gate_tiles = chunk_outputs(
        x, B, C, B_bias, C_bias, D, z, mimo_x, mimo_z, mimo_o, norm_weight, ids, log_decay, key_log, diagonal, phase,
        states, kept_y, d_out, batch, chunk, here, head, tokens, packed, scalars, keys, left, seqlen, chunks,
        head_start, HEADS, HEADS_HERE, STATE_HEADS, HEAD_DIM, D_STATE, STRIDE, PAIRS, RANK, CHUNK, TOKEN_STRIDE, AHEAD,
    )  # fmt: skip
    q0, q1, q2, k0, k1, k2, s0, s1, s2, v = tiles
    by_out, gate, weight_z, weight_o, norm = gate_tiles
    by_y, by_z, by_mimo_z, by_mimo_o, by_norm = gate_rows_backward(
        y,
        widened(read_by_token(by_out, valued)),
        widened(read_by_token(gate, valued)),
        None if mimo_z is None else read_by_rank(weight_z, valued),
        None if mimo_o is None else read_by_rank(weight_o, valued),
        None if norm_weight is None else read_by_rank(norm, valued),
        norm_eps,
        HEAD_DIM,
    )
    partial = (batch * chunks + chunk) * HEADS + head
    store_tokens(d_z + packed, by_z, by_out, left, HEADS * HEAD_DIM, CHUNK, RANK, HEAD_DIM)
    if mimo_z is not None:
        by_mimo_z = share(by_mimo_z.to(dtype), CHUNK, RANK, HEAD_DIM)
        by_mimo_o = share(by_mimo_o.to(dtype), CHUNK, RANK, HEAD_DIM)
        fence_async_shared()
        of_mimo_z = sum_of_tokens(by_mimo_z, RANK, HEAD_DIM)
        of_mimo_o = sum_of_tokens(by_mimo_o, RANK, HEAD_DIM)
        of_mimo_z, of_mimo_o = warpgroup_mma_wait(0, [of_mimo_z, of_mimo_o, by_mimo_z, by_mimo_o])[:2]
        store_ranks(d_mimo_z + partial * (RANK * HEAD_DIM), of_mimo_z, RANK, HEAD_DIM)
        store_ranks(d_mimo_o + partial * (RANK * HEAD_DIM), of_mimo_o, RANK, HEAD_DIM)
    if norm_weight is not None:
        of_norm = gl.sum(gl.sum(by_norm, axis=0), axis=0)
        gl.store(d_norm + partial * HEAD_DIM + gl.arange(0, HEAD_DIM, of_norm.type.layout), of_norm)

    # Scaled before the product with the state, so that both products of a query's gradient can follow one another.
    by_scaled = by_row((by_y * from_start[:, None, None]).to(dtype), CHUNK, RANK, HEAD_DIM)
    of_y = share(by_y.to(dtype), CHUNK, RANK, HEAD_DIM)
    fence_async_shared()
    # [rows, P] @ [rows, P]ᵀ -> [rows, rows]; [rows, P] @ [P, N] -> [rows, N]
    zero = gl.zeros([64, 64], gl.float32, product_layout(64))
    by_score = warpgroup_mma(of_y, v.permute((1, 0)), zero, use_acc=False, is_async=True)
    d0, d1, d2 = dot_from_state(by_scaled, s0, s1, s2, PAIRS, REST)
    store_rows(d_y + rows * HEAD_DIM, of_y, 64, HEAD_DIM, 64, HEAD_DIM)
    by_score = weigh(warpgroup_mma_wait(PARTS, [by_score, of_y])[0], weight, CHUNK, RANK).to(dtype)
    # [rows, rows] @ [rows, N] -> [rows, N], from the chunk's keys
    d0, d1, d2 = dot_onto_state(by_score, k0, k1, k2, d0, d1, d2, PAIRS, REST)
    fraction = load_by_token(phase + scalars * PAIRS, PAIRS, CHUNK, PAIRS, turned)
    # What the products read is kept until they are through: nothing else may be put in its place before.
    d0, d1 = warpgroup_mma_wait(0, [d0, d1, k0, k1, s0, s1, v])[:2]
    if REST > 0:
        d2 = warpgroup_mma_wait(0, [d2, k2, s2])[0]
    rotation_gradients(q0, q1, q2, d0, d1, d2, fraction, None, d_queries + rows * D_STATE,
                       d_phase + rows // RANK * PAIRS, inner + scalars, CHUNK, RANK, PAIRS, REST)  # fmt: skip
