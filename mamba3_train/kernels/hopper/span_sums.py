"""What each span of chunks adds to the state, or on the way back to the state's gradient, on Hopper.

No chain as a walk is: each chunk's rows are turned and scaled to where the span ends, or begins, and the matrix units
add up what they give. So chunks are taken from there on, and only the turn and decay that were passed are carried.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared

from mamba3_train.kernels.hopper.gradient_walk import copy_queries, copy_y
from mamba3_train.kernels.hopper.layouts import operand_layout, row_layout
from mamba3_train.kernels.hopper.memory import copy_bias, copy_weights, fetch_ahead, put
from mamba3_train.kernels.hopper.state_walk import copy_keys, copy_tokens, fetch_walk
from mamba3_train.kernels.hopper.states import store_state, zero_state
from mamba3_train.kernels.hopper.stream import (
    allocate_rows,
    allocate_stream,
    end_product,
    hold_bias,
    nothing_passed,
    of_chunk,
    place_of_walk,
    read_scale_in_span,
    start_product,
    store_passed,
    turn_chunk_in_span,
)
from mamba3_train.kernels.hopper.tiles import rows_of_values


@gluon.jit
def copy_next(stream, tile, values, rows, phase, log, log_decay, chunk_decay, document_ids, chunk, seqlen,
              BACK: gl.constexpr, STRIDE: gl.constexpr, TOKEN_STRIDE: gl.constexpr, CHUNK: gl.constexpr,
              RANK: gl.constexpr, HEAD_DIM: gl.constexpr, PAIRS: gl.constexpr, REST: gl.constexpr):  # fmt: skip
    """Start copying all that a chunk brings."""
    if BACK:
        copy_queries(stream, rows, phase, log, chunk_decay, document_ids, chunk, seqlen,
                     STRIDE, CHUNK, RANK, PAIRS, REST)  # fmt: skip
        copy_y(tile, values, chunk, HEAD_DIM)
    else:
        copy_keys(stream, rows, phase, log, log_decay, chunk_decay, document_ids, chunk, seqlen,
                  STRIDE, CHUNK, RANK, PAIRS, REST)  # fmt: skip
        copy_tokens(tile, values, chunk, seqlen, TOKEN_STRIDE, CHUNK, HEAD_DIM)
    async_copy.commit_group()


@gluon.jit
def turn_chunk_and_values(stream, turned, slot, tokens, weight_x, bias, passed, BACK: gl.constexpr, BIAS: gl.constexpr,
                          DOCUMENTS: gl.constexpr, CHUNK: gl.constexpr, RANK: gl.constexpr, HEAD_DIM: gl.constexpr,
                          PAIRS: gl.constexpr, REST: gl.constexpr):  # fmt: skip
    """`turn_chunk_in_span`, scaled unless there are weights: then `rows_of_values` are; 0.0 for them without."""
    v = 0.0
    if weight_x is not None:
        scale = read_scale_in_span(stream, passed, BACK, DOCUMENTS, row_layout(HEAD_DIM, RANK))
        v = rows_of_values(tokens, weight_x, scale, RANK, HEAD_DIM)
    passed = turn_chunk_in_span(stream, turned, slot, bias, passed, BACK, weight_x is None, BIAS, DOCUMENTS,
                                CHUNK, RANK, PAIRS, REST)  # fmt: skip
    return passed, v


@gluon.jit(do_not_specialize=["seqlen", "chunks", "head_start"])
def hopper_span_sums_kernel(
    values, mimo_x, rows, rows_bias, document_ids, log, log_decay, chunk_decay, phase, sums, span_decay, span_turn,
    seqlen, chunks, head_start,
    HEADS: gl.constexpr, HEADS_HERE: gl.constexpr, GROUPS: gl.constexpr, HEAD_DIM: gl.constexpr,
    D_STATE: gl.constexpr, PAIRS: gl.constexpr, RANK: gl.constexpr, CHUNK: gl.constexpr,
    TOKEN_STRIDE: gl.constexpr, SPAN: gl.constexpr, BACK: gl.constexpr,
):  # fmt: skip
    """Programs: heads of the pass, batch, and spans of SPAN chunks, but the last one, or with BACK the first.

    values, rows, rows_bias, log: x, B, B_bias and key_log, of the state where a span ends; with BACK d_y, (batch,
    HEADS_HERE, rows, P), C, C_bias and log_decay, of the gradient where it begins, and mimo_x is None. sums: (batch,
    HEADS_HERE, spans, P, N), span_decay: (batch, HEADS_HERE, spans), a span's whole decay, float32; span_turn (…,
    PAIRS) its whole turn, like phase.
    """
    STRIDE: gl.constexpr = GROUPS * D_STATE
    REST: gl.constexpr = D_STATE - 2 * PAIRS
    FETCH: gl.constexpr = 4
    DOCUMENTS: gl.constexpr = document_ids is not None
    dtype: gl.constexpr = values.dtype.element_ty
    span = gl.program_id(2) + BACK
    batch, here, head, first, end, of_head, start, scalars, of_rows = place_of_walk(
        span, SPAN, seqlen, chunks, head_start, HEADS, HEADS_HERE, GROUPS, D_STATE, RANK, CHUNK
    )
    of_pass = batch * HEADS_HERE + here
    of_span = of_pass * (gl.num_programs(2) + 1) + span
    rows += of_rows
    log += scalars
    log_decay += scalars
    phase += scalars * PAIRS
    chunk_decay += of_head * chunks
    if BACK:
        values += of_pass * chunks * (64 * HEAD_DIM)
    else:
        values += start * TOKEN_STRIDE + head * HEAD_DIM
    if DOCUMENTS:
        document_ids += start

    bias = copy_bias(rows_bias, head, RANK, PAIRS, REST)
    weight_x = (
        None if mimo_x is None else copy_weights(mimo_x + head * (RANK * HEAD_DIM), HEAD_DIM, RANK, HEAD_DIM, False)
    )
    stream = allocate_stream(rows, phase, DOCUMENTS, CHUNK, RANK, PAIRS, REST)
    turned = allocate_rows(dtype, PAIRS, REST)
    TOKENS: gl.constexpr = 64 if BACK else CHUNK
    # Two chunks' tokens, and those that a product reads where they lie.
    SLOTS: gl.constexpr = 3 if mimo_x is None else 2
    tokens = gl.allocate_shared_memory(dtype, [SLOTS, TOKENS, HEAD_DIM], operand_layout(TOKENS, HEAD_DIM, dtype))
    tiles = tokens
    if mimo_x is not None:
        tiles = gl.allocate_shared_memory(dtype, [2, 64, HEAD_DIM], operand_layout(64, HEAD_DIM, dtype))
    s0, s1, s2 = zero_state(HEAD_DIM, PAIRS, REST)
    passed = nothing_passed(phase, RANK, PAIRS)

    # From where the span begins on the way back, otherwise from its end.
    origin = first if BACK else end - 1
    step = 1 if BACK else -1
    count = end - first
    for i in gl.static_range(2):
        place = origin + step * gl.minimum(i, count - 1)
        copy_next(of_chunk(stream, i, DOCUMENTS, REST), tokens.index(i), values, rows, phase, log, log_decay,
                  chunk_decay, document_ids, place, seqlen, BACK, STRIDE, TOKEN_STRIDE, CHUNK, RANK, HEAD_DIM, PAIRS,
                  REST)  # fmt: skip
    async_copy.wait_group(1)
    passed, v = turn_chunk_and_values(of_chunk(stream, 0, DOCUMENTS, REST), turned, 0, tokens.index(0), weight_x, bias,
                                      passed, BACK, rows_bias is not None, DOCUMENTS, CHUNK, RANK, HEAD_DIM, PAIRS,
                                      REST)  # fmt: skip
    if rows_bias is not None:
        bias = hold_bias(bias, RANK, PAIRS, REST)
    if mimo_x is not None:
        put(tiles.index(0), v, CHUNK, RANK, HEAD_DIM)
    fence_async_shared()
    for i in range(count - 1):
        slot = i % 2
        of_value = tiles.index(i % SLOTS)
        place = origin + step * gl.minimum(i + 2, count - 1)
        copy_next(of_chunk(stream, slot, DOCUMENTS, REST), tokens.index((i + 2) % SLOTS), values, rows, phase, log,
                  log_decay, chunk_decay, document_ids, place, seqlen, BACK, STRIDE, TOKEN_STRIDE, CHUNK, RANK,
                  HEAD_DIM, PAIRS, REST)  # fmt: skip
        s0, s1, s2 = start_product(of_value, turned, slot, s0, s1, s2, PAIRS, REST)
        # Meanwhile the next chunk's rows.
        async_copy.wait_group(1)
        passed, v = turn_chunk_and_values(of_chunk(stream, 1 - slot, DOCUMENTS, REST), turned, 1 - slot,
                                          tokens.index((i + 1) % SLOTS), weight_x, bias, passed, BACK,
                                          rows_bias is not None, DOCUMENTS, CHUNK, RANK, HEAD_DIM, PAIRS,
                                          REST)  # fmt: skip
        if mimo_x is not None:
            put(tiles.index(1 - slot), v, CHUNK, RANK, HEAD_DIM)
        soon = origin + step * gl.minimum(i + FETCH, count - 1)
        if BACK:
            fetch_ahead(phase + soon * (CHUNK * PAIRS), CHUNK * PAIRS * 2)
            fetch_ahead(values + soon.to(gl.int64) * (64 * HEAD_DIM), 64 * HEAD_DIM * 2)
        else:
            fetch_walk(values + soon.to(gl.int64) * (CHUNK * TOKEN_STRIDE), phase + soon * (CHUNK * PAIRS),
                       CHUNK * PAIRS * 2, TOKEN_STRIDE, seqlen - soon * CHUNK, CHUNK)  # fmt: skip
        s0, s1, s2 = end_product(of_value, turned, slot, s0, s1, s2, REST)
    async_copy.wait_group(0)
    slot = (count - 1) % 2
    of_value = tiles.index((count - 1) % SLOTS)
    s0, s1, s2 = start_product(of_value, turned, slot, s0, s1, s2, PAIRS, REST)
    s0, s1, s2 = end_product(of_value, turned, slot, s0, s1, s2, REST)
    store_state(sums + of_span * (HEAD_DIM * D_STATE), s0, s1, s2, PAIRS, REST)
    store_passed(span_decay + of_span, span_turn + of_span * PAIRS, passed, PAIRS)
