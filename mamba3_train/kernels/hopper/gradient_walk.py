"""The gradient of the state at each chunk's end on Hopper: what leads to it and its passing back in one walk.

What a chunk's outputs add to the gradient of the state before it never reaches memory: see `state_walk.py`. Whole
sequences are walked, or all spans at a time, from the gradients that they begin with (`span_sums.py`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared

from mamba3_train.kernels.hopper.layouts import operand_layout
from mamba3_train.kernels.hopper.memory import copy_bias, copy_tile_to, fetch_ahead, fold_ranks
from mamba3_train.kernels.hopper.states import (
    copy_state_to,
    load_state,
    read_mixed,
    state_tiles,
    store_mixed,
    store_state,
    zero_state,
)
from mamba3_train.kernels.hopper.stream import (
    allocate_rows,
    allocate_stream,
    copy_chunk,
    decay_state,
    end_product,
    hold_bias,
    of_chunk,
    place_of_walk,
    start_product,
    turn_chunk,
)
from mamba3_train.kernels.hopper.tiles import cosine_sine, rounded


@gluon.jit
def copy_queries(stream, C, phase, log_decay, chunk_decay, document_ids, chunk, seqlen, STRIDE: gl.constexpr,
                 CHUNK: gl.constexpr, RANK: gl.constexpr, PAIRS: gl.constexpr, REST: gl.constexpr):  # fmt: skip
    """Start copying what a chunk brings but y's gradient, from pointers to the sequence's first."""
    left = seqlen - chunk * CHUNK
    token = chunk.to(gl.int64) * CHUNK
    ids = None
    edge = None
    if document_ids is not None:
        ids = document_ids + token
        edge = ids + gl.maximum(-1, -chunk * CHUNK)
    copy_chunk(stream, C + token * (RANK * STRIDE), phase + token * PAIRS, log_decay + token,
               None, chunk_decay + chunk, ids, edge, left, STRIDE, CHUNK, RANK, PAIRS, REST)  # fmt: skip


@gluon.jit
def copy_y(tile, d_y, chunk, HEAD_DIM: gl.constexpr):
    """Start copying y's gradient of a chunk."""
    copy_tile_to(tile, d_y + chunk.to(gl.int64) * (64 * HEAD_DIM), None, 64, HEAD_DIM, HEAD_DIM)


@gluon.jit
def store_inner(inner, d_turn, s0, s1, s2, a0, a1, a2, cos, sin, PAIRS: gl.constexpr, REST: gl.constexpr,
                INNER_PARTS: gl.constexpr):  # fmt: skip
    """Gradients by a chunk's whole decay and turn, in one part a warp.

    s: the gradient of the state after the chunk, rounded here as the keys see it: what they and the state contribute
    must cancel. a: that state, in shared memory and in the next chunk's frame. Each column's sums are turned, not it.
    """
    s0 = rounded(s0, a0.dtype)
    s1 = rounded(s1, a0.dtype)
    after0 = read_mixed(a0, PAIRS)
    after1 = read_mixed(a1, PAIRS)
    across = sum_in_thread(s0 * after1 - s1 * after0, INNER_PARTS, PAIRS)
    along = sum_in_thread(s0 * after0 + s1 * after1, INNER_PARTS, PAIRS)
    of_column: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, across.type.layout))
    cos = gl.convert_layout(cos, of_column, assert_trivial=True)[None, None, :]
    sin = gl.convert_layout(sin, of_column, assert_trivial=True)[None, None, :]
    store_sum_of_rows(d_turn, across * cos + along * sin, INNER_PARTS, PAIRS)
    by_decay = sum_of_eights(along * cos - across * sin, INNER_PARTS, PAIRS)
    if REST > 0:
        rest = sum_in_thread(rounded(s2, a2.dtype) * read_mixed(a2, REST), INNER_PARTS, REST)
        rest = sum_of_eights(rest, INNER_PARTS, REST)
        by_decay += gl.convert_layout(rest, by_decay.type.layout, assert_trivial=True)
    by_decay = gl.sum(gl.reshape(by_decay, [INNER_PARTS, 64]), axis=1)
    gl.store(inner + gl.arange(0, INNER_PARTS, by_decay.type.layout), by_decay)


@gluon.jit
def store_sum_of_rows(target, tile, PARTS: gl.constexpr, WIDTH: gl.constexpr):
    """Sum (PARTS, 8, WIDTH) over its rows and store (PARTS, WIDTH): each row's threads a share of the columns."""
    if WIDTH < 32:
        rows = gl.sum(tile, axis=1)
        part = gl.arange(0, PARTS, gl.SliceLayout(1, rows.type.layout))[:, None]
        column = gl.arange(0, WIDTH, gl.SliceLayout(0, rows.type.layout))[None, :]
    else:
        # The columns' highest bits and, at 32, the lowest, which is all that a thread has left.
        LAST: gl.constexpr = 8 if WIDTH > 32 else 1
        rows = fold_ranks(tile, 1, WIDTH // 2, PARTS, 8, WIDTH)
        rows = fold_ranks(rows, 2, WIDTH // 4, PARTS, 8, WIDTH // 2)
        rows = fold_ranks(rows, 4, LAST, PARTS, 8, WIDTH // 4)
        part = gl.arange(0, PARTS, gl.SliceLayout(1, gl.SliceLayout(2, rows.type.layout)))[:, None, None]
        row = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, rows.type.layout)))[None, :, None]
        column = gl.arange(0, WIDTH // 8, gl.SliceLayout(0, gl.SliceLayout(1, rows.type.layout)))[None, None, :]
        if WIDTH == 32:
            column = column * 2
        column += row % 2 * (WIDTH // 2) + row // 2 % 2 * (WIDTH // 4) + row // 4 * LAST
    gl.store(target + part * WIDTH + column, rows)


@gluon.jit
def sum_in_thread(tile, PARTS: gl.constexpr, WIDTH: gl.constexpr):
    """Sum a product's (64, WIDTH) rows over the bit of 8, whose numbers are in one thread: (PARTS, 8, WIDTH)."""
    return gl.sum(gl.reshape(tile, [PARTS, 2, 8, WIDTH]), axis=1)


@gluon.jit
def sum_of_eights(tile, PARTS: gl.constexpr, WIDTH: gl.constexpr):
    """Its columns over the bits from 8 on, likewise: (PARTS, 8, 8)."""
    return gl.sum(gl.reshape(tile, [PARTS, 8, WIDTH // 8, 8]), axis=2)


@gluon.jit(do_not_specialize=["length", "seqlen", "chunks", "head_start"])
def hopper_gradient_walk_kernel(
    C, C_bias, d_y, document_ids, log_decay, chunk_decay, phase, states, d_states, starts, d_initial, inner, d_turn,
    length, seqlen, chunks, head_start,
    HEADS: gl.constexpr, HEADS_HERE: gl.constexpr, GROUPS: gl.constexpr, HEAD_DIM: gl.constexpr,
    D_STATE: gl.constexpr, PAIRS: gl.constexpr, RANK: gl.constexpr, CHUNK: gl.constexpr, STATE_HEADS: gl.constexpr,
    WHOLE: gl.constexpr, INNER_PARTS: gl.constexpr,
):  # fmt: skip
    """Programs: heads of the pass, batch, and walks of `length` chunks (WHOLE: of all), each from its end to its start.

    d_y: (batch, HEADS_HERE, rows, P). states: (batch, chunks + 1, STATE_HEADS, P, N), before each chunk and after the
    last, from the pass's first head on. d_states: (batch, chunks + 1, HEADS_HERE, P, N), takes the gradients of all
    but the first of them; may be states itself. d_initial, inner, d_turn: as in
    `state_passing_backward_kernel`, the last two in INNER_PARTS parts, one a warp. starts: (batch, HEADS_HERE, walks,
    P, N) float32, the gradient of the state after each walk, None for zero.
    """
    STRIDE: gl.constexpr = GROUPS * D_STATE
    REST: gl.constexpr = D_STATE - 2 * PAIRS
    SIZE: gl.constexpr = HEAD_DIM * D_STATE
    FETCH: gl.constexpr = 4
    DOCUMENTS: gl.constexpr = document_ids is not None
    dtype: gl.constexpr = d_y.dtype.element_ty
    batch, here, head, first, end, of_head, start, scalars, queries = place_of_walk(
        gl.program_id(2), length, seqlen, chunks, head_start, HEADS, HEADS_HERE, GROUPS, D_STATE, RANK, CHUNK
    )
    of_pass = batch * HEADS_HERE + here
    of_walk = of_pass * gl.num_programs(2) + gl.program_id(2)
    C += queries
    log_decay += scalars
    phase += scalars * PAIRS
    chunk_decay += of_head * chunks
    d_y += of_pass * chunks * (64 * HEAD_DIM)
    if DOCUMENTS:
        document_ids += start

    bias = copy_bias(C_bias, head, RANK, PAIRS, REST)
    stream = allocate_stream(C, phase, DOCUMENTS, CHUNK, RANK, PAIRS, REST)
    rows = allocate_rows(dtype, PAIRS, REST)
    y = gl.allocate_shared_memory(dtype, [2, 64, HEAD_DIM], operand_layout(64, HEAD_DIM, dtype))
    if starts is None:
        s0, s1, s2 = zero_state(HEAD_DIM, PAIRS, REST)
    else:
        s0, s1, s2 = load_state(starts + (of_head if WHOLE else of_walk) * SIZE, PAIRS, REST)

    chunk = end - 1
    copy_queries(of_chunk(stream, 0, DOCUMENTS, REST), C, phase, log_decay, chunk_decay, document_ids, chunk, seqlen,
                 STRIDE, CHUNK, RANK, PAIRS, REST)  # fmt: skip
    copy_y(y.index(0), d_y, chunk, HEAD_DIM)
    async_copy.commit_group()
    following = gl.maximum(chunk - 1, first)
    copy_queries(of_chunk(stream, 1, DOCUMENTS, REST), C, phase, log_decay, chunk_decay, document_ids, following,
                 seqlen, STRIDE, CHUNK, RANK, PAIRS, REST)  # fmt: skip
    async_copy.commit_group()
    SLOT: gl.constexpr = STATE_HEADS * SIZE
    states += ((batch * (chunks + 1) + 1) * STATE_HEADS + here) * SIZE  # after each chunk
    d_states += ((batch * (chunks + 1) + 1) * HEADS_HERE + here) * SIZE
    inner += of_head * chunks * INNER_PARTS
    d_turn += of_head * chunks * (INNER_PARTS * PAIRS)
    a0, a1, a2 = state_tiles(dtype, HEAD_DIM, PAIRS, REST)
    copy_state_to(a0, a1, a2, states + chunk.to(gl.int64) * SLOT, HEAD_DIM, PAIRS, REST)
    async_copy.commit_group()
    copy_y(y.index(1), d_y, following, HEAD_DIM)
    async_copy.commit_group()
    async_copy.wait_group(3)
    turn, decay, rest_decay = turn_chunk(of_chunk(stream, 0, DOCUMENTS, REST), rows, 0, bias, False,
                                         C_bias is not None, DOCUMENTS, CHUNK, RANK, PAIRS, REST)  # fmt: skip
    if C_bias is not None:
        bias = hold_bias(bias, RANK, PAIRS, REST)
    fence_async_shared()

    for i in range(end - first):
        chunk = end - 1 - i
        slot = i % 2
        # Behind the walk's first chunk that one is brought and turned once more.
        following = gl.maximum(chunk - 2, first)
        copy_queries(of_chunk(stream, slot, DOCUMENTS, REST), C, phase, log_decay, chunk_decay, document_ids,
                     following, seqlen, STRIDE, CHUNK, RANK, PAIRS, REST)  # fmt: skip
        async_copy.commit_group()
        # Into the chunk's own frame.
        cos, sin = cosine_sine(turn)
        turned = s0 * cos[None, :] - s1 * sin[None, :]
        s1 = s1 * cos[None, :] + s0 * sin[None, :]
        s0 = turned
        async_copy.wait_group(2)  # the state and all before it
        store_inner(inner + chunk * INNER_PARTS, d_turn + chunk * (INNER_PARTS * PAIRS), s0, s1, s2, a0, a1, a2,
                    cos, sin, PAIRS, REST, INNER_PARTS)  # fmt: skip
        store_mixed(d_states + chunk.to(gl.int64) * (HEADS_HERE * SIZE), s0, s1, s2, PAIRS, REST)
        of_y = y.index(slot)
        s0, s1, s2 = decay_state(s0, s1, s2, decay, rest_decay, REST)
        s0, s1, s2 = start_product(of_y, rows, slot, s0, s1, s2, PAIRS, REST)
        # Meanwhile the next chunk's rows.
        next = gl.maximum(chunk - 1, first)
        copy_state_to(a0, a1, a2, states + next.to(gl.int64) * SLOT, HEAD_DIM, PAIRS, REST)
        async_copy.commit_group()
        turn, decay, rest_decay = turn_chunk(of_chunk(stream, 1 - slot, DOCUMENTS, REST), rows, 1 - slot, bias, False,
                                             C_bias is not None, DOCUMENTS, CHUNK, RANK, PAIRS, REST)  # fmt: skip
        soon = gl.maximum(chunk - FETCH, first)
        fetch_ahead(phase + soon * (CHUNK * PAIRS), CHUNK * PAIRS * 2)
        fetch_ahead(d_y + soon.to(gl.int64) * (64 * HEAD_DIM), 64 * HEAD_DIM * 2)
        fetch_ahead(states + soon.to(gl.int64) * SLOT, SIZE * 2)
        s0, s1, s2 = end_product(of_y, rows, slot, s0, s1, s2, REST)
        copy_y(y.index(slot), d_y, following, HEAD_DIM)
        async_copy.commit_group()
    async_copy.wait_group(0)
    if d_initial is not None:  # noqa: SIM102 (the compiler decides the one, the program the other)
        if first == 0:
            store_state(d_initial + of_head * SIZE, s0, s1, s2, PAIRS, REST)
