"""Hand the state from chunk to chunk, turning it into each chunk's own frame; and the same backwards.

    before_c = S_c        S_{c+1} = R(−Θ_c) [decay_c S_c + local_c]        (reference: `state_passing`)

A program owns ROWS rows of P and COLUMN_PAIRS pairs of columns of one head's state and walks the chunks. The unrotated
columns are paired too (column i of their first half with column i of their second) and turned by zero. Results go to a
separate buffer and several chunks are loaded before the first is used: the walk is a chain, but its loads are not.
"""

import triton
import triton.language as tl

from mamba3_train.kernels.tiles import cosine_sine

ROWS = 16


@triton.jit
def _tile(D_STATE: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, COLUMN_PAIRS: tl.constexpr):
    """Offsets of the program's first columns, distance to their second columns, whether rotated, and first pair."""
    blocks: tl.constexpr = D_STATE // 2 // COLUMN_PAIRS
    pair = tl.program_id(0) % blocks * COLUMN_PAIRS
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    rotated = pair < PAIRS
    column = tl.where(rotated, pair, pair + PAIRS) + tl.arange(0, COLUMN_PAIRS)
    return row[:, None] * D_STATE + column[None, :], tl.where(rotated, PAIRS, D_STATE // 2 - PAIRS), rotated, pair


@triton.jit
def _load(base, at, second, chunk, inside, SLOT: tl.constexpr):
    """Both halves of a tile of one chunk's state, float32; zero outside the sequence."""
    base += chunk * SLOT
    first = tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
    return first, tl.load(base + at + second, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_turn(phase, chunk, inside, rotated, pair, PAIRS: tl.constexpr, CHUNK: tl.constexpr,
               COLUMN_PAIRS: tl.constexpr, HARDWARE_TRIG: tl.constexpr):  # fmt: skip
    """Cosine and sine of a chunk's whole angle, its last token's phase: two (1, COLUMN_PAIRS)."""
    at = phase + (chunk * CHUNK + CHUNK - 1) * PAIRS + pair + tl.arange(0, COLUMN_PAIRS)
    cos, sin = cosine_sine(tl.load(at, mask=inside & rotated, other=0), HARDWARE_TRIG)
    return cos[None, :], sin[None, :]


@triton.jit
def _step_forward(a, b, local, chunk, chunks, before, chunk_decay, phase, at, second, rotated, pair,
                  SLOT: tl.constexpr, PAIRS: tl.constexpr, CHUNK: tl.constexpr, COLUMN_PAIRS: tl.constexpr,
                  HARDWARE_TRIG: tl.constexpr):  # fmt: skip
    """Store the state before a chunk and return the one after it; outside the sequence, leave it alone."""
    inside = chunk < chunks
    decay = tl.load(chunk_decay + chunk, mask=inside, other=1.0)
    to = before + chunk * SLOT + at
    tl.store(to, a.to(before.dtype.element_ty), mask=inside)
    tl.store(to + second, b.to(before.dtype.element_ty), mask=inside)
    first, last = local
    a = decay * a + first
    b = decay * b + last
    if PAIRS > 0:
        cos, sin = _load_turn(phase, chunk, inside, rotated, pair, PAIRS, CHUNK, COLUMN_PAIRS, HARDWARE_TRIG)
        first = a * cos + b * sin
        b = b * cos - a * sin
        a = first
    return a, b


@triton.jit(do_not_specialize=["chunks", "head_start"])
def state_passing_kernel(
    local, initial, chunk_decay, phase, before, last, chunks, head_start,
    HEADS: tl.constexpr, HEADS_HERE: tl.constexpr, HEAD_DIM: tl.constexpr, D_STATE: tl.constexpr, PAIRS: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMN_PAIRS: tl.constexpr, HARDWARE_TRIG: tl.constexpr,
):  # fmt: skip
    """local: (batch, chunks, HEADS_HERE, P, N); initial, last: (batch, HEADS, P, N) float32, initial None for zero.

    before: (batch, chunks + 1, HEADS_HERE, P, N); its last slot is the state after the sequence.
    """
    SIZE: tl.constexpr = HEAD_DIM * D_STATE
    SLOT: tl.constexpr = HEADS_HERE * SIZE
    here = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    head = batch * HEADS + head_start + here
    at, second, rotated, pair = _tile(D_STATE, PAIRS, ROWS, COLUMN_PAIRS)
    local += (batch * chunks * HEADS_HERE + here) * SIZE
    before += (batch * (chunks + 1) * HEADS_HERE + here) * SIZE
    chunk_decay += head * chunks
    phase += head * chunks * (CHUNK * PAIRS)

    a = tl.zeros((ROWS, COLUMN_PAIRS), tl.float32)
    b = tl.zeros((ROWS, COLUMN_PAIRS), tl.float32)
    if initial is not None:
        a = tl.load(initial + head * SIZE + at)
        b = tl.load(initial + head * SIZE + at + second)
    for i in range(0, chunks, 4):
        chunk = tl.zeros((), tl.int64) + i
        local_0 = _load(local, at, second, chunk, chunk < chunks, SLOT)
        local_1 = _load(local, at, second, chunk + 1, chunk + 1 < chunks, SLOT)
        local_2 = _load(local, at, second, chunk + 2, chunk + 2 < chunks, SLOT)
        local_3 = _load(local, at, second, chunk + 3, chunk + 3 < chunks, SLOT)
        a, b = _step_forward(a, b, local_0, chunk, chunks, before, chunk_decay, phase, at, second, rotated, pair,
                             SLOT, PAIRS, CHUNK, COLUMN_PAIRS, HARDWARE_TRIG)  # fmt: skip
        a, b = _step_forward(a, b, local_1, chunk + 1, chunks, before, chunk_decay, phase, at, second, rotated, pair,
                             SLOT, PAIRS, CHUNK, COLUMN_PAIRS, HARDWARE_TRIG)  # fmt: skip
        a, b = _step_forward(a, b, local_2, chunk + 2, chunks, before, chunk_decay, phase, at, second, rotated, pair,
                             SLOT, PAIRS, CHUNK, COLUMN_PAIRS, HARDWARE_TRIG)  # fmt: skip
        a, b = _step_forward(a, b, local_3, chunk + 3, chunks, before, chunk_decay, phase, at, second, rotated, pair,
                             SLOT, PAIRS, CHUNK, COLUMN_PAIRS, HARDWARE_TRIG)  # fmt: skip
    to = before + chunks.to(tl.int64) * SLOT + at
    tl.store(to, a.to(before.dtype.element_ty))
    tl.store(to + second, b.to(before.dtype.element_ty))
    tl.store(last + head * SIZE + at, a)
    tl.store(last + head * SIZE + at + second, b)


@triton.jit
def _step_backward(a, b, local, after, chunk, chunks, at_end, chunk_decay, phase, inner, d_turn, at, second, rotated,
                   pair, SLOT: tl.constexpr, PAIRS: tl.constexpr, CHUNK: tl.constexpr, COLUMN_PAIRS: tl.constexpr,
                   INNER_PARTS: tl.constexpr, TURN_PARTS: tl.constexpr, HARDWARE_TRIG: tl.constexpr):  # fmt: skip
    """From the gradient of the state after a chunk to that of the one before it."""
    inside = chunk >= 0
    decay = tl.load(chunk_decay + chunk, mask=inside, other=1.0)
    after_a, after_b = after
    tl.store(inner + chunk * INNER_PARTS, tl.sum(tl.sum(a * after_a + b * after_b, axis=1), axis=0), mask=inside)
    if PAIRS > 0:
        by_turn = tl.sum(a * after_b - b * after_a, axis=0)
        tl.store(d_turn + chunk * (TURN_PARTS * PAIRS) + tl.arange(0, COLUMN_PAIRS), by_turn, mask=inside & rotated)
        cos, sin = _load_turn(phase, chunk, inside, rotated, pair, PAIRS, CHUNK, COLUMN_PAIRS, HARDWARE_TRIG)
        first = a * cos - b * sin
        b = b * cos + a * sin
        a = first
    to = at_end + chunk * SLOT + at
    tl.store(to, a.to(at_end.dtype.element_ty), mask=inside)
    tl.store(to + second, b.to(at_end.dtype.element_ty), mask=inside)
    first, last = local
    return decay * a + first, decay * b + last


@triton.jit(do_not_specialize=["chunks", "head_start"])
def state_passing_backward_kernel(
    d_local, d_last, before, chunk_decay, phase, d_at_end, d_initial, inner, d_turn, chunks, head_start,
    HEADS: tl.constexpr, HEADS_HERE: tl.constexpr, HEAD_DIM: tl.constexpr, D_STATE: tl.constexpr, PAIRS: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMN_PAIRS: tl.constexpr, INNER_PARTS: tl.constexpr,
    HARDWARE_TRIG: tl.constexpr,
):  # fmt: skip
    """d_local: (batch, chunks, HEADS_HERE, P, N), what each chunk's outputs add to the gradient of the state before it.

    d_at_end: the same shape, the gradient of the state at each chunk's end in the chunk's own frame. d_last, d_initial:
    (batch, HEADS, P, N) float32, d_last None for zero. inner: (batch, HEADS, chunks, INNER_PARTS) sums of S · dS at each
    chunk's end; d_turn: (batch, HEADS, chunks, P / ROWS, PAIRS) the gradient by each chunk's whole angle.
    """
    SIZE: tl.constexpr = HEAD_DIM * D_STATE
    SLOT: tl.constexpr = HEADS_HERE * SIZE
    TURN_PARTS: tl.constexpr = HEAD_DIM // ROWS
    here = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    head = batch * HEADS + head_start + here
    at, second, rotated, pair = _tile(D_STATE, PAIRS, ROWS, COLUMN_PAIRS)
    d_local += (batch * chunks * HEADS_HERE + here) * SIZE
    d_at_end += (batch * chunks * HEADS_HERE + here) * SIZE
    before += (batch * (chunks + 1) * HEADS_HERE + here) * SIZE
    after = before + SLOT
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
    for i in range(0, chunks, 2):
        chunk = tl.zeros((), tl.int64) + (chunks - 1 - i)
        local_0 = _load(d_local, at, second, chunk, chunk >= 0, SLOT)
        after_0 = _load(after, at, second, chunk, chunk >= 0, SLOT)
        local_1 = _load(d_local, at, second, chunk - 1, chunk >= 1, SLOT)
        after_1 = _load(after, at, second, chunk - 1, chunk >= 1, SLOT)
        a, b = _step_backward(a, b, local_0, after_0, chunk, chunks, d_at_end, chunk_decay, phase, inner, d_turn, at,
                              second, rotated, pair, SLOT, PAIRS, CHUNK, COLUMN_PAIRS, INNER_PARTS, TURN_PARTS,
                              HARDWARE_TRIG)  # fmt: skip
        a, b = _step_backward(a, b, local_1, after_1, chunk - 1, chunks, d_at_end, chunk_decay, phase, inner, d_turn,
                              at, second, rotated, pair, SLOT, PAIRS, CHUNK, COLUMN_PAIRS, INNER_PARTS, TURN_PARTS,
                              HARDWARE_TRIG)  # fmt: skip
    tl.store(d_initial + head * SIZE + at, a)
    tl.store(d_initial + head * SIZE + at + second, b)
