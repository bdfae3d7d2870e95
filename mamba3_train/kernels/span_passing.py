"""Hand the state from span to span of a sequence, turning it into each span's own frame; and the gradient backwards.

    S_{i+1} = decay_i R(−Θ_i) S_i + sum_i          dS_i = decay_i R(Θ_i) dS_{i+1} + sum_i

A program owns ROWS rows of P and COLUMN_PAIRS pairs of columns of one head's state, as in `state_passing`.
"""

import triton
import triton.language as tl

from mamba3_train.kernels.state_passing import tile
from mamba3_train.kernels.tiles import cosine_sine

AHEAD = 4


@triton.jit(do_not_specialize=["spans", "head_start"])
def span_passing_kernel(
    states, first, decay, turn, spans, head_start,
    HEADS: tl.constexpr, HEADS_HERE: tl.constexpr, HEAD_DIM: tl.constexpr, D_STATE: tl.constexpr, PAIRS: tl.constexpr,
    ROWS: tl.constexpr, COLUMN_PAIRS: tl.constexpr, AHEAD: tl.constexpr, BACKWARD: tl.constexpr,
    HARDWARE: tl.constexpr,
):  # fmt: skip
    """states: (batch, HEADS_HERE, spans, P, N) float32: what each span adds to the state (BACKWARD: to the gradient
    of the state before it); becomes the state before it (BACKWARD: the gradient of the state after it).

    What the last span adds (BACKWARD: the first) may be anything. first: (batch, HEADS, P, N) float32, what the walk
    begins with, None for zero. decay: (batch, HEADS_HERE, spans); turn: (…, PAIRS), 16-bit fractions of a turn.
    """
    SIZE: tl.constexpr = HEAD_DIM * D_STATE
    here = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    at, second, rotated, pair = tile(D_STATE, PAIRS, ROWS, COLUMN_PAIRS)
    of_head = batch * HEADS_HERE + here
    states += of_head * spans * SIZE + at
    decay += of_head * spans
    turn += of_head * spans * PAIRS + pair + tl.arange(0, COLUMN_PAIRS)
    of_all = (batch * HEADS + head_start + here) * SIZE + at
    a = tl.zeros((ROWS, COLUMN_PAIRS), tl.float32)
    b = tl.zeros((ROWS, COLUMN_PAIRS), tl.float32)
    if first is not None:
        a = tl.load(first + of_all)
        b = tl.load(first + of_all + second)
    for i in range(0, spans, AHEAD):
        sums = ()
        for j in tl.static_range(AHEAD):
            inside = i + j < spans
            span = spans - 1 - i - j if BACKWARD else i + j
            to = states + span.to(tl.int64) * SIZE
            added = tl.load(to, inside, 0.0), tl.load(to + second, inside, 0.0)
            whole = tl.load(decay + span, inside, 1.0), tl.load(turn + span * PAIRS, inside & rotated, 0)
            sums = sums + ((added, whole),)  # noqa: RUF005
        for j in tl.static_range(AHEAD):
            inside = i + j < spans
            span = spans - 1 - i - j if BACKWARD else i + j
            to = states + span.to(tl.int64) * SIZE
            tl.store(to, a, inside)
            tl.store(to + second, b, inside)
            added, whole = sums[j]
            sum_a, sum_b = added
            left, fraction = whole
            cos, sin = cosine_sine(fraction[None, :], HARDWARE)
            if BACKWARD:
                sin = -sin
            turned = a * cos + b * sin
            b = left * (b * cos - a * sin) + sum_b
            a = left * turned + sum_a
