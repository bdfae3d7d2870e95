"""What a walk's next chunk but one brings, on its way to shared memory while two are worked on.

Loads into registers would not do: the hardware follows loads by six counters only, so that a wait for a number from
shared memory is often one for the next chunk's numbers from memory, too. Copies to shared memory have their own. There
is room for two chunks, so that a copy begins a whole chunk's work before it is waited for.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, warpgroup_mma_wait

from mamba3_train.kernels.hopper.layouts import copy_layout, left_layout, operand_layout, product_layout, row_layout
from mamba3_train.kernels.hopper.memory import put
from mamba3_train.kernels.hopper.tiles import bias_of_rows, dot_onto_state, exp2, turn_of, turned_rows


@gluon.jit
def place_of_walk(walk, length, seqlen, chunks, head_start, HEADS: gl.constexpr, HEADS_HERE: gl.constexpr,
                  GROUPS: gl.constexpr, D_STATE: gl.constexpr, RANK: gl.constexpr, CHUNK: gl.constexpr):  # fmt: skip
    """A program's row of the batch, head of the pass and of all, its chunks first to end, and where its row begins.

    walk: among the row's, of `length` chunks each. of_head: the head among all rows', start: the row's first
    token among all, scalars: its first number in what has one a token and head, padded, rows: its first of B and C.
    """
    here = gl.program_id(0)
    batch = gl.program_id(1).to(gl.int64)
    head = head_start + here
    start = batch * seqlen
    of_head = batch * HEADS + head
    scalars = of_head * chunks * CHUNK
    rows = start * (RANK * GROUPS * D_STATE) + head // (HEADS // GROUPS) * D_STATE
    first = walk * length
    end = gl.minimum(first + length, chunks)
    return batch, here, head, first, end, of_head, start, scalars, rows


@gluon.constexpr_function
def plain_layout(rank):
    """In shared memory, for a tensor of this rank that is read as it was written."""
    return gl.SwizzledSharedLayout(1, 1, 1, list(reversed(range(rank))))


@gluon.constexpr_function
def each_layout():
    """For a vector of 32-bit numbers: one a thread."""
    return gl.BlockedLayout([1], [32], [4], [0])


@gluon.jit
def allocate_stream(B, phase, DOCUMENTS: gl.constexpr, CHUNK: gl.constexpr, RANK: gl.constexpr, PAIRS: gl.constexpr,
                    REST: gl.constexpr):  # fmt: skip
    """Shared memory for two chunks: three parts of rows, phases, the last of them, scales and ids or one of them."""
    dtype: gl.constexpr = B.dtype.element_ty
    turn: gl.constexpr = phase.dtype.element_ty
    k0 = gl.allocate_shared_memory(dtype, [2, CHUNK, RANK, PAIRS], plain_layout(3))
    k1 = gl.allocate_shared_memory(dtype, [2, CHUNK, RANK, PAIRS], plain_layout(3))
    k2 = 0.0
    if REST > 0:
        k2 = gl.allocate_shared_memory(dtype, [2, CHUNK, RANK, REST], plain_layout(3))
    phases = gl.allocate_shared_memory(turn, [2, CHUNK, PAIRS], plain_layout(2))
    turns = gl.allocate_shared_memory(turn, [2, PAIRS], plain_layout(1))
    logs = gl.allocate_shared_memory(gl.float32, [2, CHUNK], plain_layout(1))
    end = gl.allocate_shared_memory(gl.float32, [2, 1], plain_layout(1))
    decay = gl.allocate_shared_memory(gl.float32, [2, 1], plain_layout(1))
    ids = 0
    edge = 0
    if DOCUMENTS:
        ids = gl.allocate_shared_memory(gl.int32, [2, CHUNK], plain_layout(1))
        edge = gl.allocate_shared_memory(gl.int32, [2, 1], plain_layout(1))
    return k0, k1, k2, phases, turns, logs, end, decay, ids, edge


@gluon.jit
def of_chunk(stream, slot, DOCUMENTS: gl.constexpr, REST: gl.constexpr):
    """One chunk's part of `allocate_stream`."""
    k0, k1, k2, phases, turns, logs, end, decay, ids, edge = stream
    if REST > 0:
        k2 = k2.index(slot)
    if DOCUMENTS:
        ids = ids.index(slot)
        edge = edge.index(slot)
    return (
        k0.index(slot), k1.index(slot), k2, phases.index(slot), turns.index(slot), logs.index(slot), end.index(slot),
        decay.index(slot), ids, edge,
    )  # fmt: skip


@gluon.jit
def copy_chunk(stream, rows, phase, log, end, decay, id, edge, left, STRIDE: gl.constexpr, CHUNK: gl.constexpr,
               RANK: gl.constexpr, PAIRS: gl.constexpr, REST: gl.constexpr):  # fmt: skip
    """Start copying a chunk to its part of the stream, of `of_chunk` as everywhere below.

    rows, phase, log, id: pointers to the chunk's first; end, decay, edge: to one number. end, id, edge may be None.
    """
    k0, k1, k2, phases, turns, logs, of_end, of_decay, ids, of_edge = stream
    copy_rows(k0, rows, left, STRIDE, CHUNK, RANK, PAIRS)
    copy_rows(k1, rows + PAIRS, left, STRIDE, CHUNK, RANK, PAIRS)
    if REST > 0:
        copy_rows(k2, rows + 2 * PAIRS, left, STRIDE, CHUNK, RANK, REST)
    token = gl.arange(0, CHUNK, gl.SliceLayout(1, copy_layout(PAIRS, 16)))[:, None]
    pair = gl.arange(0, PAIRS, gl.SliceLayout(0, copy_layout(PAIRS, 16)))[None, :]
    async_copy.async_copy_global_to_shared(phases, phase + token * PAIRS + pair)
    two: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    last = phase + (CHUNK - 1) * PAIRS + gl.arange(0, PAIRS, two)
    async_copy.async_copy_global_to_shared(turns, last)
    token = gl.arange(0, CHUNK, each_layout())
    async_copy.async_copy_global_to_shared(logs, log + token)
    one = gl.arange(0, 1, each_layout())
    if end is not None:
        async_copy.async_copy_global_to_shared(of_end, end + one)
    async_copy.async_copy_global_to_shared(of_decay, decay + one)
    if id is not None:
        async_copy.async_copy_global_to_shared(ids, id + gl.minimum(token, left - 1))
        async_copy.async_copy_global_to_shared(of_edge, edge + one)


@gluon.jit
def copy_rows(tile, rows, left, STRIDE: gl.constexpr, CHUNK: gl.constexpr, RANK: gl.constexpr, WIDTH: gl.constexpr):
    """Start copying WIDTH columns of a chunk's rows, STRIDE apart, zero past the sequence's end."""
    layout: gl.constexpr = row_layout(WIDTH, RANK)
    token = gl.arange(0, CHUNK, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    rank = gl.arange(0, RANK, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    at = rows + (token * RANK + rank) * STRIDE + column
    async_copy.async_copy_global_to_shared(tile, at, mask=(token < left) & (rank >= 0) & (column >= 0))


@gluon.jit
def read_rows(stream, RANK: gl.constexpr, PAIRS: gl.constexpr, REST: gl.constexpr):
    """A chunk's rows in three parts, and its phases, as `load_parts` and `load_by_token` load them."""
    k0, k1, k2, phases, _, _, _, _, _, _ = stream
    first = k0.load(row_layout(PAIRS, RANK))
    second = k1.load(row_layout(PAIRS, RANK))
    rest = 0.0
    if REST > 0:
        rest = k2.load(row_layout(REST, RANK))
    fraction = phases.load(gl.SliceLayout(1, row_layout(PAIRS, RANK)))
    return first, second, rest, fraction


@gluon.jit
def read_scale(stream, TO_END: gl.constexpr, DOCUMENTS: gl.constexpr, layout: gl.constexpr):
    """Each token's decay to the chunk's end or since its start, (CHUNK, 1, 1); 0 where a document begins in between."""
    _, _, _, _, _, logs, end, _, ids, edge = stream
    slice: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, layout))
    log = logs.load(slice)
    if TO_END:
        log = end.load(slice) - log
    scale = exp2(log, True)
    if DOCUMENTS:
        scale = gl.where(ids.load(slice) == edge.load(slice), scale, 0.0)
    return scale[:, None, None]


@gluon.jit
def read_turn(stream, PAIRS: gl.constexpr):
    """A chunk's whole turn, (PAIRS,), to fit a product."""
    _, _, _, _, turns, _, _, _, _, _ = stream
    return turns.load(gl.SliceLayout(0, product_layout(PAIRS)))


@gluon.jit
def read_decay(stream, WIDTH: gl.constexpr):
    """A chunk's whole decay, (1,), to fit a product."""
    _, _, _, _, _, _, _, decay, _, _ = stream
    return decay.load(gl.SliceLayout(1, product_layout(WIDTH)))


@gluon.jit
def allocate_rows(dtype: gl.constexpr, PAIRS: gl.constexpr, REST: gl.constexpr):
    """Shared memory for the turned rows of two chunks, in three parts."""
    q0 = gl.allocate_shared_memory(dtype, [2, 64, PAIRS], operand_layout(64, PAIRS, dtype))
    q1 = gl.allocate_shared_memory(dtype, [2, 64, PAIRS], operand_layout(64, PAIRS, dtype))
    q2 = 0.0
    if REST > 0:
        q2 = gl.allocate_shared_memory(dtype, [2, 64, REST], operand_layout(64, REST, dtype))
    return q0, q1, q2


@gluon.jit
def hold_bias(bias, RANK: gl.constexpr, PAIRS: gl.constexpr, REST: gl.constexpr):
    """A head's bias from shared memory to registers, for a whole walk."""
    b0, b1, b2 = bias
    b0 = bias_of_rows(b0, RANK, PAIRS)
    b1 = bias_of_rows(b1, RANK, PAIRS)
    if REST > 0:
        b2 = bias_of_rows(b2, RANK, REST)
    return b0, b1, b2


@gluon.jit
def turn_chunk(stream, rows, slot, bias, TO_END: gl.constexpr, BIAS: gl.constexpr, DOCUMENTS: gl.constexpr,
               CHUNK: gl.constexpr, RANK: gl.constexpr, PAIRS: gl.constexpr, REST: gl.constexpr):  # fmt: skip
    """What arrived in the stream, plus its bias, turned and scaled, to a slot of `allocate_rows`.

    Returns the chunk's whole turn and its decay, the latter to fit the first two parts and the third.
    """
    k0, k1, k2, fraction = read_rows(stream, RANK, PAIRS, REST)
    scale = read_scale(stream, TO_END, DOCUMENTS, row_layout(PAIRS, RANK))
    rest_scale = None
    if REST > 0:
        rest_scale = read_scale(stream, TO_END, DOCUMENTS, row_layout(REST, RANK))
    put_turned(rows, slot, k0, k1, k2, bias, fraction, scale, rest_scale, BIAS, CHUNK, RANK, PAIRS, REST)
    decay = read_decay(stream, PAIRS)
    rest_decay = 0.0
    if REST > 0:
        rest_decay = gl.convert_layout(decay, gl.SliceLayout(1, product_layout(REST)), assert_trivial=True)
    return read_turn(stream, PAIRS), decay, rest_decay


@gluon.jit
def put_turned(rows, slot, k0, k1, k2, bias, fraction, scale, rest_scale, BIAS: gl.constexpr, CHUNK: gl.constexpr,
               RANK: gl.constexpr, PAIRS: gl.constexpr, REST: gl.constexpr):  # fmt: skip
    """`turned_rows` to a slot of `allocate_rows`, times their scales if there are any."""
    cos, sin = turn_of(fraction)
    if scale is not None:
        cos *= scale
        sin *= scale
    b0, b1, b2 = bias
    k0, k1, k2 = turned_rows(k0, k1, k2, b0, b1, b2, cos, sin, rest_scale, BIAS, RANK, PAIRS, REST)
    q0, q1, q2 = rows
    put(q0.index(slot), k0, CHUNK, RANK, PAIRS)
    put(q1.index(slot), k1, CHUNK, RANK, PAIRS)
    if REST > 0:
        put(q2.index(slot), k2, CHUNK, RANK, REST)


@gluon.jit
def nothing_passed(phase, RANK: gl.constexpr, PAIRS: gl.constexpr):
    """Turn (PAIRS,) and decay (1,) of no chunk, to fit a chunk's rows."""
    pairs: gl.constexpr = row_layout(PAIRS, RANK)
    turn = gl.zeros([PAIRS], phase.dtype.element_ty, gl.SliceLayout(0, gl.SliceLayout(1, pairs)))
    return turn, gl.zeros([1], gl.float32, gl.SliceLayout(1, gl.SliceLayout(2, pairs))) + 1.0


@gluon.jit
def read_scale_in_span(stream, passed, BACK: gl.constexpr, DOCUMENTS: gl.constexpr, layout: gl.constexpr):
    """`read_scale` to where the span begins (BACK) or ends, past the decay `passed` on the way."""
    _, decay = passed
    decay = gl.convert_layout(decay, gl.SliceLayout(1, gl.SliceLayout(2, layout)), assert_trivial=True)
    return read_scale(stream, not BACK, DOCUMENTS, layout) * decay[:, None, None]


@gluon.jit
def turn_chunk_in_span(stream, rows, slot, bias, passed, BACK: gl.constexpr, SCALE: gl.constexpr, BIAS: gl.constexpr,
                       DOCUMENTS: gl.constexpr, CHUNK: gl.constexpr, RANK: gl.constexpr, PAIRS: gl.constexpr,
                       REST: gl.constexpr):  # fmt: skip
    """`turn_chunk` in the frame where the span begins (BACK) or ends, past the turn and decay `passed` on the way.

    Returns `passed` with this chunk's.
    """
    turn, decay = passed
    k0, k1, k2, fraction = read_rows(stream, RANK, PAIRS, REST)
    _, _, _, _, turns, _, _, own_decay, _, _ = stream
    own = turns.load(turn.type.layout)
    if BACK:
        fraction += turn[None, :]
        turn += own
    else:
        turn += own
        fraction -= turn[None, :]
    scale = None
    rest_scale = None
    if SCALE:
        scale = read_scale_in_span(stream, passed, BACK, DOCUMENTS, row_layout(PAIRS, RANK))
        if REST > 0:
            rest_scale = read_scale_in_span(stream, passed, BACK, DOCUMENTS, row_layout(REST, RANK))
    put_turned(rows, slot, k0, k1, k2, bias, fraction, scale, rest_scale, BIAS, CHUNK, RANK, PAIRS, REST)
    return turn, decay * own_decay.load(decay.type.layout)


@gluon.jit
def store_passed(span_decay, span_turn, passed, PAIRS: gl.constexpr):
    """A span's whole decay and turn."""
    turn, decay = passed
    gl.store(span_decay + gl.arange(0, 1, decay.type.layout), decay)
    gl.store(span_turn + gl.arange(0, PAIRS, turn.type.layout), turn)


@gluon.jit
def decay_state(s0, s1, s2, decay, rest_decay, REST: gl.constexpr):
    """A state's decay by a chunk."""
    s0 *= decay[:, None]
    s1 *= decay[:, None]
    if REST > 0:
        s2 *= rest_decay[:, None]
    return s0, s1, s2


@gluon.jit
def start_product(a, rows, slot, s0, s1, s2, PAIRS: gl.constexpr, REST: gl.constexpr):
    """Start a state's sum with aᵀ @ a chunk's rows, which were fenced."""
    q0, q1, q2 = rows
    third = 0.0
    if REST > 0:
        third = q2.index(slot)
    # In registers the left operand is read once for all parts.
    left = a.permute((1, 0)).load(left_layout(PAIRS))
    # [P, rows] @ [rows, N] + [P, N] -> [P, N]
    return dot_onto_state(left, q0.index(slot), q1.index(slot), third, s0, s1, s2, PAIRS, REST)


@gluon.jit
def end_product(a, rows, slot, s0, s1, s2, REST: gl.constexpr):
    """Wait for `start_product`; what it reads is kept until then. What was written meanwhile is for the next one.

    Fenced here, where no product is under way: ptxas 12.8 crashed on fences between one and its wait.
    """
    q0, q1, q2 = rows
    s0, s1 = warpgroup_mma_wait(0, [s0, s1, a, q0.index(slot), q1.index(slot)])[:2]
    if REST > 0:
        s2 = warpgroup_mma_wait(0, [s2, q2.index(slot)])[0]
    fence_async_shared()
    return s0, s1, s2
