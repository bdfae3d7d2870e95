"""The key side of a chunk's gradients on Hopper: what `kernels/chunk_key.py` computes, laid out by hand."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mamba3_train.kernels.hopper.diagonal import add_to_diagonal, sums_on_diagonal, trace
from mamba3_train.kernels.hopper.layouts import (
    accumulator_layout,
    left_layout,
    neighbour_layout,
    product_layout,
    row_layout,
)
from mamba3_train.kernels.hopper.memory import (
    by_token,
    copy_bias,
    copy_tile,
    copy_weights,
    fetch_chunk_ahead,
    keep_place,
    load_by_token,
    load_parts,
    place_of_program,
    read_by_rank,
    read_by_token,
    share,
    store_ranks,
    store_tokens,
    widened,
)
from mamba3_train.kernels.hopper.states import copy_state
from mamba3_train.kernels.hopper.tiles import (
    decay_to_end,
    dot_from_state,
    dot_onto_state,
    dot_over_state,
    hold,
    load_by_phase,
    load_pair_scales,
    rotation_gradients,
    scale_tokens,
    share_turned,
    share_values,
    sum_of_tokens,
    turn_of,
    weigh,
    weight_pairs,
)


@gluon.jit(do_not_specialize=["seqlen", "chunks", "head_start"])
def hopper_chunk_keys_backward_kernel(
    x, B, C, B_bias, C_bias, D, mimo_x, document_ids, log_decay, key_log, diagonal, phase, d_states, d_y,
    d_x, d_keys, d_phase, inner, d_diagonal, d_D, d_mimo_x, seqlen, chunks, head_start,
    HEADS: gl.constexpr, HEADS_HERE: gl.constexpr, GROUPS: gl.constexpr, HEAD_DIM: gl.constexpr,
    D_STATE: gl.constexpr, PAIRS: gl.constexpr, RANK: gl.constexpr, CHUNK: gl.constexpr,
    TOKEN_STRIDE: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """Shapes as in `chunk_keys_backward_kernel`, but d_D: (batch, 4 · chunks, HEADS), a part a warp."""
    STRIDE: gl.constexpr = GROUPS * D_STATE
    REST: gl.constexpr = D_STATE - 2 * PAIRS
    PARTS: gl.constexpr = 3 if REST > 0 else 2
    dtype: gl.constexpr = x.dtype.element_ty
    pairs: gl.constexpr = row_layout(PAIRS, RANK)
    valued: gl.constexpr = accumulator_layout(HEAD_DIM, RANK)
    turned: gl.constexpr = neighbour_layout(PAIRS, RANK)
    square: gl.constexpr = product_layout(64)
    chunk, here, batch, head, start, left, scalars, keys = place_of_program(
        seqlen, chunks, head_start, HEADS, HEADS_HERE, GROUPS, D_STATE, RANK, CHUNK
    )
    rows = ((batch * HEADS_HERE + here) * chunks + chunk) * (CHUNK * RANK)
    partial = (batch * chunks + chunk) * HEADS + head
    ids = None if document_ids is None else document_ids + start
    log_decay += scalars
    key_log += scalars
    d_states += HEADS_HERE * HEAD_DIM * D_STATE

    # Everything is on its way before the first of it is waited for.
    k0, k1, k2 = load_parts(B + keys, left, STRIDE, CHUNK, RANK, PAIRS, REST)
    fraction = load_by_token(phase + scalars * PAIRS, PAIRS, CHUNK, PAIRS, pairs)
    b0, b1, b2 = copy_bias(B_bias, head, RANK, PAIRS, REST)
    c0, c1, c2 = copy_bias(C_bias, head, RANK, PAIRS, REST)
    raw = copy_tile(x + start * TOKEN_STRIDE + head * HEAD_DIM, left, CHUNK, TOKEN_STRIDE, HEAD_DIM)
    weight_x = None
    if mimo_x is not None:
        weight_x = copy_weights(mimo_x + head * (RANK * HEAD_DIM), HEAD_DIM, RANK, HEAD_DIM, False)
    async_copy.commit_group()
    state = d_states + ((batch * (chunks + 1) + chunk) * HEADS_HERE + here) * (HEAD_DIM * D_STATE)
    s0, s1, s2 = copy_state(state, HEAD_DIM, PAIRS, REST)
    by_y = copy_tile(d_y + rows * HEAD_DIM, None, 64, HEAD_DIM, HEAD_DIM)
    async_copy.commit_group()
    q0, q1, q2 = load_parts(C + keys, left, STRIDE, CHUNK, RANK, PAIRS, REST)
    of_row, of_column, gamma, id_row, id_column = load_pair_scales(
        log_decay, key_log, diagonal + scalars, ids, left, True, CHUNK, RANK
    )
    to_end = decay_to_end(log_decay, key_log, ids, left, CHUNK, valued)
    skip = None if D is None else gl.load(D + head).to(gl.float32)
    fetch_chunk_ahead(
        d_states, d_y, phase, x, None, seqlen, chunks, head_start,
        HEADS, HEADS_HERE, HEADS_HERE, HEAD_DIM, D_STATE, PAIRS, RANK, CHUNK, TOKEN_STRIDE, AHEAD,
    )  # fmt: skip
    async_copy.wait_group(1)
    cos, sin = turn_of(hold(fraction, True))
    k0, k1, k2 = share_turned(k0, k1, k2, b0, b1, b2, cos, sin, B_bias is not None, CHUNK, RANK, PAIRS, REST)
    q0, q1, q2 = share_turned(q0, q1, q2, c0, c1, c2, cos, sin, C_bias is not None, CHUNK, RANK, PAIRS, REST)
    v = share_values(raw, weight_x, CHUNK, RANK, HEAD_DIM)
    async_copy.wait_group(0)
    fence_async_shared()
    keep_place(b0, b1, b2, B_bias is not None, REST)
    keep_place(c0, c1, c2, C_bias is not None, REST)

    # Keys in rows, queries in columns: [rows, N] @ [rows, N]ᵀ and [rows, P] @ [rows, P]ᵀ -> [rows, rows]
    scores = dot_over_state(k0, k1, k2, q0, q1, q2, REST)
    zero = gl.zeros([64, 64], gl.float32, square)
    by_score = warpgroup_mma(v, by_y.permute((1, 0)), zero, use_acc=False, is_async=True)
    # From the state: [rows, N] @ [P, N]ᵀ -> [rows, P]
    d_v = dot_over_state(k0, k1, k2, s0, s1, s2, REST)
    weight = weight_pairs(of_row, of_column, gamma, id_row, id_column, ids is not None, True, CHUNK, RANK)
    scores, by_score = warpgroup_mma_wait(PARTS, [scores, by_score])
    same = sums_on_diagonal(scores, by_score, CHUNK, RANK)
    gl.store(d_diagonal + scalars + gl.arange(0, CHUNK, same.type.layout), same)
    on_diagonal = trace(by_score)
    scores = weigh(scores, weight, CHUNK, RANK)
    by_score = weigh(by_score, weight, CHUNK, RANK).to(dtype)
    if D is not None:
        scores = add_to_diagonal(scores, skip)
    scores = gl.convert_layout(scores.to(dtype), left_layout(64))
    d_v = scale_tokens(warpgroup_mma_wait(0, [d_v]), to_end, CHUNK, RANK, HEAD_DIM)
    # [rows, rows] @ [rows, P] -> [rows, P]
    d_v = warpgroup_mma(scores, by_y, d_v, is_async=True)
    if D is not None:
        warp = gl.arange(0, 4, on_diagonal.type.layout)
        gl.store(d_D + ((batch * chunks + chunk) * 4 + warp) * HEADS + head, on_diagonal)
    # What the products read is kept until they are through: nothing else may be put in its place before.
    d_x_of = by_token(warpgroup_mma_wait(0, [d_v, by_y])[0], CHUNK, RANK, HEAD_DIM)
    if mimo_x is not None:
        by_mimo = share((d_x_of * widened(read_by_token(raw, valued))).to(dtype), CHUNK, RANK, HEAD_DIM)
        d_x_of = d_x_of * read_by_rank(weight_x, valued)
    store_tokens(d_x + (start * HEADS + head) * HEAD_DIM, d_x_of, by_y, left, HEADS * HEAD_DIM, CHUNK, RANK, HEAD_DIM)
    if mimo_x is not None:
        fence_async_shared()
        of_mimo = warpgroup_mma_wait(0, [sum_of_tokens(by_mimo, RANK, HEAD_DIM), by_mimo])[0]
        store_ranks(d_mimo_x + partial * (RANK * HEAD_DIM), of_mimo, RANK, HEAD_DIM)

    # Phases in another layout, by a copy: the assembler puts a load into registers off until the products are through.
    phases = copy_tile(phase + scalars * PAIRS, None, CHUNK, PAIRS, PAIRS)
    async_copy.commit_group()
    # From the state: [rows, P] @ [P, N] -> [rows, N]
    d0, d1, d2 = dot_from_state(v, s0, s1, s2, PAIRS, REST)
    to = d_phase + rows // RANK * PAIRS
    by_queries = load_by_phase(to, CHUNK, RANK, PAIRS)
    d0, d1 = warpgroup_mma_wait(0, [d0, d1, s0, s1, v])[:2]
    d0 = scale_tokens(d0, to_end, CHUNK, RANK, PAIRS)
    d1 = scale_tokens(d1, to_end, CHUNK, RANK, PAIRS)
    if REST > 0:
        d2 = scale_tokens(warpgroup_mma_wait(0, [d2, s2])[0], to_end, CHUNK, RANK, REST)
    # [rows, rows] @ [rows, N] -> [rows, N], from the chunk's queries
    d0, d1, d2 = dot_onto_state(by_score, q0, q1, q2, d0, d1, d2, PAIRS, REST)
    d0, d1 = warpgroup_mma_wait(0, [d0, d1, q0, q1])[:2]
    if REST > 0:
        d2 = warpgroup_mma_wait(0, [d2, q2])[0]
    async_copy.wait_group(0)
    fraction = phases.load(gl.SliceLayout(1, turned))
    rotation_gradients(k0, k1, k2, d0, d1, d2, fraction, by_queries, d_keys + rows * D_STATE, to, inner + scalars,
                       CHUNK, RANK, PAIRS, REST)  # fmt: skip
