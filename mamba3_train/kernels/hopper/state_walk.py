"""The state before each chunk on Hopper: `kernels/chunk_state.py` and `state_passing.py` in one walk along the chunks.

What a chunk adds to the state never reaches memory: the matrix units add it to the state in registers. The walk is a
chain, so what the next chunk needs is on its way meanwhile. Where there are heads enough, the forward walks a head's
whole sequence in one program, otherwise parts of several spans at a time, from states that `span_sums.py` leads to. It
keeps the state at every SPAN chunks, from which the backward walks all spans at a time.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared

from mamba3_train.kernels.hopper.layouts import operand_layout
from mamba3_train.kernels.hopper.memory import (
    copy_bias,
    copy_tile_to,
    copy_weights,
    fetch_ahead,
    fetch_line,
    put,
)
from mamba3_train.kernels.hopper.states import load_state, store_mixed, store_state, zero_state
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
from mamba3_train.kernels.hopper.tiles import cosine_sine, rows_of_values


@gluon.jit
def copy_keys(stream, B, phase, key_log, log_decay, chunk_decay, document_ids, chunk, seqlen, STRIDE: gl.constexpr,
              CHUNK: gl.constexpr, RANK: gl.constexpr, PAIRS: gl.constexpr, REST: gl.constexpr):  # fmt: skip
    """Start copying what a chunk brings but its tokens, from pointers to the sequence's first."""
    left = seqlen - chunk * CHUNK
    token = chunk.to(gl.int64) * CHUNK
    ids = None
    edge = None
    if document_ids is not None:
        ids = document_ids + token
        edge = ids + gl.minimum(CHUNK - 1, left - 1)
    copy_chunk(stream, B + token * (RANK * STRIDE), phase + token * PAIRS, key_log + token,
               log_decay + token + CHUNK - 1, chunk_decay + chunk, ids, edge, left,
               STRIDE, CHUNK, RANK, PAIRS, REST)  # fmt: skip


@gluon.jit
def copy_tokens(tile, x, chunk, seqlen, TOKEN_STRIDE: gl.constexpr, CHUNK: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Start copying a chunk's tokens, from a pointer to the sequence's first."""
    token = chunk.to(gl.int64) * CHUNK
    copy_tile_to(tile, x + token * TOKEN_STRIDE, seqlen - chunk * CHUNK, CHUNK, TOKEN_STRIDE, HEAD_DIM)


@gluon.jit
def keep_start(kept, chunk, s0, s1, s2, SPAN: gl.constexpr, PAIRS: gl.constexpr, REST: gl.constexpr):
    """Store the state before a chunk if a span begins with it."""
    if chunk % SPAN == 0:
        store_state(kept + (chunk // SPAN) * (64 * (2 * PAIRS + REST)), s0, s1, s2, PAIRS, REST)


@gluon.jit
def fetch_walk(x, phase, BYTES: gl.constexpr, TOKEN_STRIDE: gl.constexpr, left, CHUNK: gl.constexpr):
    """Ask for a chunk's tokens and phases to be in the L2 cache soon."""
    token = gl.arange(0, CHUNK, gl.BlockedLayout([1], [32], [4], [0]))
    fetch_line((x + gl.minimum(token, left - 1) * TOKEN_STRIDE).to(gl.int64))
    fetch_ahead(phase, BYTES)


@gluon.jit(do_not_specialize=["length", "seqlen", "chunks", "head_start"])
def hopper_state_walk_kernel(
    x, mimo_x, B, B_bias, document_ids, log_decay, key_log, chunk_decay, phase, starts, before, kept, last,
    length, seqlen, chunks, head_start,
    HEADS: gl.constexpr, HEADS_HERE: gl.constexpr, GROUPS: gl.constexpr, HEAD_DIM: gl.constexpr,
    D_STATE: gl.constexpr, PAIRS: gl.constexpr, RANK: gl.constexpr, CHUNK: gl.constexpr,
    TOKEN_STRIDE: gl.constexpr, STATE_HEADS: gl.constexpr, SPAN: gl.constexpr,
):  # fmt: skip
    """Programs: heads of the pass, batch, and walks of `length` chunks: of all, or of whole spans.

    starts: the state before each span up to the last walk's, (batch, HEADS, spans, P, N) float32, None for zero.
    before: (batch, chunks + 1, STATE_HEADS, P, N), from the pass's first head on. kept: (batch, HEADS, spans, P, N) and
    last: (batch, HEADS, P, N), float32; None where they are not wanted.
    """
    STRIDE: gl.constexpr = GROUPS * D_STATE
    REST: gl.constexpr = D_STATE - 2 * PAIRS
    SIZE: gl.constexpr = HEAD_DIM * D_STATE
    FETCH: gl.constexpr = 4
    DOCUMENTS: gl.constexpr = document_ids is not None
    dtype: gl.constexpr = x.dtype.element_ty
    batch, here, head, first, end, of_head, start, scalars, keys = place_of_walk(
        gl.program_id(2), length, seqlen, chunks, head_start, HEADS, HEADS_HERE, GROUPS, D_STATE, RANK, CHUNK
    )
    B += keys
    log_decay += scalars
    key_log += scalars
    phase += scalars * PAIRS
    chunk_decay += of_head * chunks
    x += start * TOKEN_STRIDE + head * HEAD_DIM
    if DOCUMENTS:
        document_ids += start
    if before is not None:
        before += ((batch * (chunks + 1) + first) * STATE_HEADS + here) * SIZE
    if kept is not None:
        kept += of_head * ((chunks + SPAN - 1) // SPAN) * SIZE

    bias = copy_bias(B_bias, head, RANK, PAIRS, REST)
    weight_x = (
        None if mimo_x is None else copy_weights(mimo_x + head * (RANK * HEAD_DIM), HEAD_DIM, RANK, HEAD_DIM, False)
    )
    stream = allocate_stream(B, phase, DOCUMENTS, CHUNK, RANK, PAIRS, REST)
    rows = allocate_rows(dtype, PAIRS, REST)
    # Two chunks' tokens, and those that a product reads where they lie.
    SLOTS: gl.constexpr = 3 if mimo_x is None else 2
    tokens = gl.allocate_shared_memory(dtype, [SLOTS, CHUNK, HEAD_DIM], operand_layout(CHUNK, HEAD_DIM, dtype))
    values = tokens
    if mimo_x is not None:
        values = gl.allocate_shared_memory(dtype, [2, 64, HEAD_DIM], operand_layout(64, HEAD_DIM, dtype))
    if starts is None:
        s0, s1, s2 = zero_state(HEAD_DIM, PAIRS, REST)
    else:
        apart = length // SPAN
        known = (gl.num_programs(2) - 1) * apart + 1
        s0, s1, s2 = load_state(starts + (of_head * known + gl.program_id(2) * apart) * SIZE, PAIRS, REST)

    for i in gl.static_range(2):
        chunk = first + i
        copy_keys(of_chunk(stream, chunk % 2, DOCUMENTS, REST), B, phase, key_log, log_decay, chunk_decay,
                  document_ids, gl.minimum(chunk, end - 1), seqlen, STRIDE, CHUNK, RANK, PAIRS, REST)  # fmt: skip
        copy_tokens(tokens.index(chunk % SLOTS), x, gl.minimum(chunk, end - 1), seqlen, TOKEN_STRIDE, CHUNK, HEAD_DIM)
        async_copy.commit_group()
    async_copy.wait_group(1)
    turn, decay, rest_decay = turn_chunk(of_chunk(stream, first % 2, DOCUMENTS, REST), rows, first % 2, bias, True,
                                         B_bias is not None, DOCUMENTS, CHUNK, RANK, PAIRS, REST)  # fmt: skip
    if B_bias is not None:
        bias = hold_bias(bias, RANK, PAIRS, REST)
    if mimo_x is not None:
        v = rows_of_values(tokens.index(first % SLOTS), weight_x, None, RANK, HEAD_DIM)
        put(values.index(first % 2), v, CHUNK, RANK, HEAD_DIM)
    fence_async_shared()
    if kept is not None:
        keep_start(kept, first, s0, s1, s2, SPAN, PAIRS, REST)

    for chunk in range(first, end):
        slot = chunk % 2
        of_value = values.index(chunk % SLOTS)
        # Behind the last chunk that one is brought and turned once more.
        following = gl.minimum(chunk + 2, end - 1)
        copy_keys(of_chunk(stream, slot, DOCUMENTS, REST), B, phase, key_log, log_decay, chunk_decay, document_ids,
                  following, seqlen, STRIDE, CHUNK, RANK, PAIRS, REST)  # fmt: skip
        copy_tokens(tokens.index((chunk + 2) % SLOTS), x, following, seqlen, TOKEN_STRIDE, CHUNK, HEAD_DIM)
        async_copy.commit_group()
        if before is not None:
            store_mixed(before, s0, s1, s2, PAIRS, REST)
            before += STATE_HEADS * SIZE
        s0, s1, s2 = decay_state(s0, s1, s2, decay, rest_decay, REST)
        s0, s1, s2 = start_product(of_value, rows, slot, s0, s1, s2, PAIRS, REST)
        cos, sin = cosine_sine(turn)
        # Meanwhile the next chunk's rows.
        async_copy.wait_group(1)
        next = of_chunk(stream, 1 - slot, DOCUMENTS, REST)
        turn, decay, rest_decay = turn_chunk(next, rows, 1 - slot, bias, True, B_bias is not None,
                                             DOCUMENTS, CHUNK, RANK, PAIRS, REST)  # fmt: skip
        if mimo_x is not None:
            v = rows_of_values(tokens.index((chunk + 1) % SLOTS), weight_x, None, RANK, HEAD_DIM)
            put(values.index(1 - slot), v, CHUNK, RANK, HEAD_DIM)
        soon = gl.minimum(chunk + FETCH, end - 1)
        fetch_walk(x + soon.to(gl.int64) * (CHUNK * TOKEN_STRIDE), phase + soon * (CHUNK * PAIRS), CHUNK * PAIRS * 2,
                   TOKEN_STRIDE, seqlen - soon * CHUNK, CHUNK)  # fmt: skip
        s0, s1, s2 = end_product(of_value, rows, slot, s0, s1, s2, REST)
        # Into the next chunk's frame.
        turned = s0 * cos[None, :] + s1 * sin[None, :]
        s1 = s1 * cos[None, :] - s0 * sin[None, :]
        s0 = turned
        if kept is not None:  # noqa: SIM102 (the compiler decides the one, the program the other)
            if chunk + 1 < end:
                keep_start(kept, chunk + 1, s0, s1, s2, SPAN, PAIRS, REST)
    async_copy.wait_group(0)
    if before is not None:  # noqa: SIM102
        if end == chunks:
            store_mixed(before, s0, s1, s2, PAIRS, REST)
    if last is not None:  # noqa: SIM102
        if end == chunks:
            store_state(last + of_head * SIZE, s0, s1, s2, PAIRS, REST)
