"""A chunk's gated outputs on Hopper: what `kernels/chunk_output.py` computes forward, laid out by hand."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mamba3_train.kernels.hopper.diagonal import add_to_diagonal
from mamba3_train.kernels.hopper.gate import gate_rows
from mamba3_train.kernels.hopper.layouts import accumulator_layout, left_layout, row_layout
from mamba3_train.kernels.hopper.memory import (
    by_row,
    by_token,
    copy_bias,
    copy_tile,
    copy_weights,
    fetch_chunk_ahead,
    keep_place,
    load_by_token,
    load_neighbours,
    load_parts,
    neighbours,
    of_neighbours,
    place_of_program,
    read_by_rank,
    read_by_token,
    store_neighbours,
    store_tokens,
    widened,
)
from mamba3_train.kernels.hopper.states import copy_state
from mamba3_train.kernels.hopper.tiles import (
    decay_from_start,
    dot_over_state,
    hold,
    load_pair_scales,
    scale_tokens,
    share_turned,
    share_values,
    turn_of,
    weigh,
    weight_pairs,
)


@gluon.jit
def outputs_of(q0, q1, q2, k0, k1, k2, s0, s1, s2, v, weight, skip, from_start, CHUNK: gl.constexpr, RANK: gl.constexpr,
               HEAD_DIM: gl.constexpr, REST: gl.constexpr):  # fmt: skip
    """y before norm and gate, (CHUNK, RANK, P), from the state before the chunk and from the chunk itself."""
    PARTS: gl.constexpr = 3 if REST > 0 else 2
    # [rows, N] @ [rows, N]ᵀ -> [rows, rows] and [rows, N] @ [P, N]ᵀ -> [rows, P]
    scores = dot_over_state(q0, q1, q2, k0, k1, k2, REST)
    y = dot_over_state(q0, q1, q2, s0, s1, s2, REST)
    scores = weigh(warpgroup_mma_wait(PARTS, [scores]), weight, CHUNK, RANK)
    if skip is not None:
        scores = add_to_diagonal(scores, skip)
    scores = gl.convert_layout(scores.to(v.dtype), left_layout(64))
    y = scale_tokens(warpgroup_mma_wait(0, [y]), from_start, CHUNK, RANK, HEAD_DIM)
    # [rows, rows] @ [rows, P] -> [rows, P]
    y = warpgroup_mma(scores, v, y, is_async=True)
    return by_token(warpgroup_mma_wait(0, [y]), CHUNK, RANK, HEAD_DIM)


@gluon.jit
def chunk_outputs(
    x, B, C, B_bias, C_bias, D, z, mimo_x, mimo_z, mimo_o, norm_weight, ids, log_decay, key_log, diagonal, phase,
    states, kept_y, d_out, batch, chunk, here, head, tokens, packed, scalars, keys, left, seqlen, chunks, head_start,
    HEADS: gl.constexpr, HEADS_HERE: gl.constexpr, STATE_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr,
    D_STATE: gl.constexpr, STRIDE: gl.constexpr, PAIRS: gl.constexpr, RANK: gl.constexpr, CHUNK: gl.constexpr,
    TOKEN_STRIDE: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """A chunk's y before norm and gate, (CHUNK, RANK, P), and in shared memory what else was brought for it.

    kept_y: where the chunk's y lies already, or None. d_out may be None. Returns y, the tiles of q, k, state and v, the
    pairs' weights, the decays from the chunk's start, and the tiles of d_out, z, mimo_z, mimo_o and norm_weight, 0.0
    for what is None.
    """
    REST: gl.constexpr = D_STATE - 2 * PAIRS
    pairs: gl.constexpr = row_layout(PAIRS, RANK)
    valued: gl.constexpr = accumulator_layout(HEAD_DIM, RANK)
    of_head = head * (RANK * HEAD_DIM)

    # Everything is on its way before the first of it is waited for.
    q0, q1, q2 = load_parts(C + keys, left, STRIDE, CHUNK, RANK, PAIRS, REST)
    fraction = load_by_token(phase + scalars * PAIRS, PAIRS, CHUNK, PAIRS, pairs)
    c0, c1, c2 = copy_bias(C_bias, head, RANK, PAIRS, REST)
    b0, b1, b2 = copy_bias(B_bias, head, RANK, PAIRS, REST)
    raw = copy_tile(x + tokens, left, CHUNK, TOKEN_STRIDE, HEAD_DIM)
    weight_x = None if mimo_x is None else copy_weights(mimo_x + of_head, HEAD_DIM, RANK, HEAD_DIM, False)
    async_copy.commit_group()
    state = states + ((batch * (chunks + 1) + chunk) * STATE_HEADS + here) * (HEAD_DIM * D_STATE)
    s0, s1, s2 = copy_state(state, HEAD_DIM, PAIRS, REST)
    by_out = 0.0 if d_out is None else copy_tile(d_out + packed, left, CHUNK, HEADS * HEAD_DIM, HEAD_DIM)
    gate = copy_tile(z + tokens, left, CHUNK, TOKEN_STRIDE, HEAD_DIM)
    weight_z = 0.0 if mimo_z is None else copy_weights(mimo_z + of_head, HEAD_DIM, RANK, HEAD_DIM, True)
    weight_o = 0.0 if mimo_o is None else copy_weights(mimo_o + of_head, HEAD_DIM, RANK, HEAD_DIM, True)
    norm = 0.0 if norm_weight is None else copy_weights(norm_weight + head * HEAD_DIM, HEAD_DIM, 1, HEAD_DIM, True)
    async_copy.commit_group()
    k0, k1, k2 = load_parts(B + keys, left, STRIDE, CHUNK, RANK, PAIRS, REST)
    of_row, of_column, gamma, id_row, id_column = load_pair_scales(
        log_decay + scalars, key_log + scalars, diagonal + scalars, ids, left, False, CHUNK, RANK
    )
    from_start = decay_from_start(log_decay + scalars, ids, chunk, left, CHUNK, valued)
    skip = None if D is None else gl.load(D + head).to(gl.float32)
    fetch_chunk_ahead(
        states, None, phase, x, z, seqlen, chunks, head_start,
        HEADS, HEADS_HERE, STATE_HEADS, HEAD_DIM, D_STATE, PAIRS, RANK, CHUNK, TOKEN_STRIDE, AHEAD,
    )  # fmt: skip
    async_copy.wait_group(1)
    cos, sin = turn_of(hold(fraction, True))
    q0, q1, q2 = share_turned(q0, q1, q2, c0, c1, c2, cos, sin, C_bias is not None, CHUNK, RANK, PAIRS, REST)
    k0, k1, k2 = share_turned(k0, k1, k2, b0, b1, b2, cos, sin, B_bias is not None, CHUNK, RANK, PAIRS, REST)
    y = 0.0
    if kept_y is not None:  # not before: there are no registers left while rows of B and C wait to be turned
        y = load_neighbours(kept_y, HEAD_DIM, HEAD_DIM)
    v = share_values(raw, weight_x, CHUNK, RANK, HEAD_DIM)
    async_copy.wait_group(0)
    fence_async_shared()
    keep_place(b0, b1, b2, B_bias is not None, REST)
    keep_place(c0, c1, c2, C_bias is not None, REST)

    weight = weight_pairs(of_row, of_column, gamma, id_row, id_column, ids is not None, False, CHUNK, RANK)
    if kept_y is None:
        y = outputs_of(q0, q1, q2, k0, k1, k2, s0, s1, s2, v, weight, skip, from_start, CHUNK, RANK, HEAD_DIM, REST)
    else:
        y = by_token(of_neighbours(widened(y), HEAD_DIM), CHUNK, RANK, HEAD_DIM)
    return y, (q0, q1, q2, k0, k1, k2, s0, s1, s2, v), weight, from_start, (by_out, gate, weight_z, weight_o, norm)


@gluon.jit(do_not_specialize=["seqlen", "chunks", "head_start"])
def hopper_chunk_outputs_kernel(
    x, B, C, B_bias, C_bias, D, z, mimo_x, mimo_z, mimo_o, norm_weight, document_ids, log_decay, key_log, diagonal,
    phase, states, kept_y, out, norm_eps, seqlen, chunks, head_start,
    HEADS: gl.constexpr, HEADS_HERE: gl.constexpr, GROUPS: gl.constexpr, HEAD_DIM: gl.constexpr,
    D_STATE: gl.constexpr, PAIRS: gl.constexpr, RANK: gl.constexpr, CHUNK: gl.constexpr,
    TOKEN_STRIDE: gl.constexpr, AHEAD: gl.constexpr, STATE_HEADS: gl.constexpr,
):  # fmt: skip
    """states: (batch, chunks + 1, STATE_HEADS, P, N), before each chunk, from the pass's first head on. out: like x.

    kept_y: (batch, HEADS, padded length · RANK, P), where y is left before norm and gate, columns `mixed`; or None.
    """
    STRIDE: gl.constexpr = GROUPS * D_STATE
    valued: gl.constexpr = accumulator_layout(HEAD_DIM, RANK)
    chunk, here, batch, head, start, left, scalars, keys = place_of_program(
        seqlen, chunks, head_start, HEADS, HEADS_HERE, GROUPS, D_STATE, RANK, CHUNK
    )
    tokens = start * TOKEN_STRIDE + head * HEAD_DIM
    packed = (start * HEADS + head) * HEAD_DIM
    ids = None if document_ids is None else document_ids + start

    y, tiles, _, _, gate_tiles = chunk_outputs(
        x, B, C, B_bias, C_bias, D, z, mimo_x, mimo_z, mimo_o, norm_weight, ids, log_decay, key_log, diagonal, phase,
        states, None, None, batch, chunk, here, head, tokens, packed, scalars, keys, left, seqlen, chunks, head_start,
        HEADS, HEADS_HERE, STATE_HEADS, HEAD_DIM, D_STATE, STRIDE, PAIRS, RANK, CHUNK, TOKEN_STRIDE, AHEAD,
    )  # fmt: skip
    _, gate, weight_z, weight_o, norm = gate_tiles
    if kept_y is not None:
        rows = neighbours(by_row(y, CHUNK, RANK, HEAD_DIM), HEAD_DIM)
        store_neighbours(kept_y + scalars * (RANK * HEAD_DIM), rows, HEAD_DIM, HEAD_DIM)
    y = gate_rows(
        y,
        widened(read_by_token(gate, valued)),
        None if mimo_z is None else read_by_rank(weight_z, valued),
        None if mimo_o is None else read_by_rank(weight_o, valued),
        None if norm_weight is None else read_by_rank(norm, valued),
        norm_eps,
        HEAD_DIM,
    )
    store_tokens(out + packed, y, tiles[9], left, HEADS * HEAD_DIM, CHUNK, RANK, HEAD_DIM)
