"""Hand the state from chunk to chunk, turning it into each chunk's own frame; and the same backwards.

    before_c = S_c        S_{c+1} = R(−Θ_c) [decay_c S_c + local_c]        (reference: `state_passing`)

A program owns ROWS rows of P and COLUMN_PAIRS pairs of columns of one head's state and walks the chunks. The unrotated
columns are paired too (column i of their first half with column i of their second) and turned by zero. Results go to a
separate buffer and several chunks are loaded before the first is used: the walk is a chain, but its loads are not.
"""

import triton
import triton.language as tl

from mamba3_train.kernels.tiles import cosine_sine

ROWS = 8
UNROLL = 16
UNROLL_BACKWARD = 8


@triton.jit
def tile(D_STATE: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, COLUMN_PAIRS: tl.constexpr):
    """Offsets of the program's first columns, distance to their second columns, whether rotated, and first pair."""
    blocks: tl.constexpr = D_STATE // 2 // COLUMN_PAIRS
    pair = tl.program_id(0) % blocks * COLUMN_PAIRS
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    rotated = pair < PAIRS
    column = tl.where(rotated, pair, pair + PAIRS) + tl.arange(0, COLUMN_PAIRS)
    return row[:, None] * D_STATE + column[None, :], tl.where(rotated, PAIRS, D_STATE // 2 - PAIRS), rotated, pair


@triton.jit
def _load(base, at, second, chunk, inside, slot):
    """Both halves of a tile of one chunk's state; zero outside the sequence."""
    base += chunk * slot
    return tl.load(base + at, mask=inside, other=0.0), tl.load(base + at + second, mask=inside, other=0.0)


@triton.jit
def _load_turn(chunk_decay, phase, chunk, inside, rotated, pair, PAIRS: tl.constexpr, CHUNK: tl.constexpr,
               COLUMN_PAIRS: tl.constexpr):  # fmt: skip
    """A chunk's decay and its whole turn, its last token's phase: a number and (COLUMN_PAIRS,)."""
    decay = tl.load(chunk_decay + chunk, mask=inside, other=1.0)
    fraction = 0.0
    if PAIRS > 0:
        at = phase + (chunk * CHUNK + CHUNK - 1) * PAIRS + pair + tl.arange(0, COLUMN_PAIRS)
        fraction = tl.load(at, mask=inside & rotated, other=0)
    return decay, fraction


@triton.jit
def _store(base, at, second, chunk, inside, a, b, slot):
    base += chunk * slot
    tl.store(base + at, a.to(base.dtype.element_ty), mask=inside)
    tl.store(base + at + second, b.to(base.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["chunks", "head_start", "heads_here"])
def state_passing_kernel(
    local, initial, chunk_decay, phase, before, last, chunks, head_start, heads_here,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, D_STATE: tl.constexpr, PAIRS: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMN_PAIRS: tl.constexpr, UNROLL: tl.constexpr,
    HARDWARE: tl.constexpr,
):  # fmt: skip
    """local: (batch, chunks, heads_here, P, N); initial, last: (batch, HEADS, P, N) float32, initial None for zero.

    before: (batch, chunks + 1, heads_here, P, N); its last slot is the state after the sequence.
    """
    SIZE: tl.constexpr = HEAD_DIM * D_STATE
    slot = heads_here * SIZE
    here = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    head = batch * HEADS + head_start + here
    at, second, rotated, pair = tile(D_STATE, PAIRS, ROWS, COLUMN_PAIRS)
    local += (batch * chunks * heads_here + here) * SIZE
    before += (batch * (chunks + 1) * heads_here + here) * SIZE
    chunk_decay += head * chunks
    phase += head * chunks * (CHUNK * PAIRS)

    a = tl.zeros((ROWS, COLUMN_PAIRS), tl.float32)
    b = tl.zeros((ROWS, COLUMN_PAIRS), tl.float32)
    if initial is not None:
        a = tl.load(initial + head * SIZE + at)
        b = tl.load(initial + head * SIZE + at + second)
    for i in range(0, chunks, UNROLL):
        chunk = tl.zeros((), tl.int64) + i
        tiles = ()
        turns = ()
        for j in tl.static_range(UNROLL):
            inside = chunk + j < chunks
            tiles = tiles + (_load(local, at, second, chunk + j, inside, slot),)  # noqa: RUF005
            turn = _load_turn(chunk_decay, phase, chunk + j, inside, rotated, pair, PAIRS, CHUNK, COLUMN_PAIRS)
            turns = turns + (turn,)  # noqa: RUF005
        for j in tl.static_range(UNROLL):
            _store(before, at, second, chunk + j, chunk + j < chunks, a, b, slot)
            decay, fraction = turns[j]
            first, last_half = tiles[j]
            a = decay * a + first.to(tl.float32)
            b = decay * b + last_half.to(tl.float32)
            if PAIRS > 0:
                cos, sin = cosine_sine(fraction[None, :], HARDWARE)
                first = a * cos + b * sin
                b = b * cos - a * sin
                a = first
    to = before + chunks.to(tl.int64) * slot + at
    tl.store(to, a.to(before.dtype.element_ty))
    tl.store(to + second, b.to(before.dtype.element_ty))
    tl.store(last + head * SIZE + at, a)
    tl.store(last + head * SIZE + at + second, b)


@triton.jit(do_not_specialize=["chunks", "head_start", "heads_here"])
def state_passing_backward_kernel(
    d_local, d_last, before, chunk_decay, phase, d_at_end, d_initial, inner, d_turn, chunks, head_start, heads_here,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, D_STATE: tl.constexpr, PAIRS: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMN_PAIRS: tl.constexpr, UNROLL: tl.constexpr,
    INNER_PARTS: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """d_local: (batch, chunks, heads_here, P, N), what each chunk's outputs add to the gradient of the state before it.

    d_at_end: the same shape, the gradient of the state at each chunk's end in the chunk's own frame. d_last, d_initial:
    (batch, HEADS, P, N) float32, d_last None for zero. inner: (batch, HEADS, chunks, INNER_PARTS) sums of S · dS at
    each chunk's end; d_turn: (batch, HEADS, chunks, P / ROWS, PAIRS) the gradient by each chunk's whole angle.
    """
    SIZE: tl.constexpr = HEAD_DIM * D_STATE
    slot = heads_here * SIZE
    TURN_PARTS: tl.constexpr = HEAD_DIM // ROWS
    here = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    head = batch * HEADS + head_start + here
    at, second, rotated, pair = tile(D_STATE, PAIRS, ROWS, COLUMN_PAIRS)
    d_local += (batch * chunks * heads_here + here) * SIZE
    d_at_end += (batch * chunks * heads_here + here) * SIZE
    before += (batch * (chunks + 1) * heads_here + here) * SIZE
    after = before + slot
    chunk_decay += head * chunks
    phase += head * chunks * (CHUNK * PAIRS)
    inner += head * chunks * INNER_PARTS + tl.program_id(0)
    row_block = tl.program_id(0) // (D_STATE // 2 // COLUMN_PAIRS)
    d_turn += (head * chunks * TURN_PARTS + row_block) * PAIRS + pair

    a = tl.zeros((ROWS, COLUMN_PAIRS), tl.float32)
    b = tl.zeros((ROWS, COLUMN_PAIRS), tl.float32)
    if d_last is not None:
        a = tl.load(d_last + head * SIZE + at)
        b = tl.load(d_last + head * SIZE + at + second)
    for i in range(0, chunks, UNROLL):
        chunk = tl.zeros((), tl.int64) + (chunks - 1 - i)
        tiles = ()
        turns = ()
        for j in tl.static_range(UNROLL):
            inside = chunk >= j
            tiles = tiles + (_load(d_local, at, second, chunk - j, inside, slot),)  # noqa: RUF005
            tiles = tiles + (_load(after, at, second, chunk - j, inside, slot),)  # noqa: RUF005
            turn = _load_turn(chunk_decay, phase, chunk - j, inside, rotated, pair, PAIRS, CHUNK, COLUMN_PAIRS)
            turns = turns + (turn,)  # noqa: RUF005
        for j in tl.static_range(UNROLL):
            inside = chunk >= j
            decay, fraction = turns[j]
            first, second_half = tiles[2 * j + 1]
            after_a = first.to(tl.float32)
            after_b = second_half.to(tl.float32)
            if PAIRS > 0:  # into the chunk's own frame
                cos, sin = cosine_sine(fraction[None, :], HARDWARE)
                first = a * cos - b * sin
                b = b * cos + a * sin
                a = first
                first = after_a * cos - after_b * sin
                after_b = after_b * cos + after_a * sin
                after_a = first
            _store(d_at_end, at, second, chunk - j, inside, a, b, slot)
            # With the rounded gradient that the keys see: what they and the state contribute must cancel.
            a_seen = a.to(d_at_end.dtype.element_ty).to(tl.float32)
            b_seen = b.to(d_at_end.dtype.element_ty).to(tl.float32)
            product = tl.sum(tl.sum(a_seen * after_a + b_seen * after_b, axis=1), axis=0)
            tl.store(inner + (chunk - j) * INNER_PARTS, product, mask=inside)
            if PAIRS > 0:
                to = d_turn + (chunk - j) * (TURN_PARTS * PAIRS) + tl.arange(0, COLUMN_PAIRS)
                tl.store(to, tl.sum(a_seen * after_b - b_seen * after_a, axis=0), mask=inside & rotated)
            first, second_half = tiles[2 * j]
            a = decay * a + first.to(tl.float32)
            b = decay * b + second_half.to(tl.float32)
    tl.store(d_initial + head * SIZE + at, a)
    tl.store(d_initial + head * SIZE + at + second, b)
