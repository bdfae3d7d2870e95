"""What the Hopper kernels do with tiles in registers and on the matrix units: counterparts of `kernels/tiles.py`.

Products are only started here, each a group of its own; the caller waits for them.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from mamba3_train.kernels import tiles
from mamba3_train.kernels.hopper.layouts import (
    accumulator_layout,
    left_layout,
    neighbour_layout,
    pair_layout,
    product_layout,
    row_layout,
)
from mamba3_train.kernels.hopper.memory import (
    by_row,
    by_token,
    in_shares,
    load_by_token,
    mixed,
    neighbour_shares,
    read_by_rank,
    read_by_token,
    share,
    store_by_token,
    store_neighbours,
    widened,
)

cosine_sine_of = gluon.jit(tiles.cosine_sine_of.fn)
exp2 = gluon.jit(tiles.exp2.fn)
hold = gluon.jit(tiles.hold.fn)


# In registers


@gluon.jit
def rounded(tile, dtype: gl.constexpr):
    """A float32 tile as `dtype` holds it, in float32.

    To bfloat16 by two numbers at a time: one by one they are converted where sines are made, eight times slower.
    """
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $3, $2; and.b32 $1, $0, 0xffff0000; shl.b32 $0, $0, 16;",
            "=r,=r,r,r", [tile], gl.float32, True, 2,
        )  # fmt: skip
    else:
        return tile.to(dtype).to(gl.float32)


@gluon.jit
def cosine_sine(fraction):
    """Cosine and sine of a fraction of a turn, int16 in units of 2⁻¹⁶; or float32, of turns, in an interpreter.

    As the last bits of a float from 2²³ on an integer needs no conversion, which the unit of sine and cosine would do.
    """
    if fraction.dtype == gl.int16:
        shifted = gl.inline_asm_elementwise(
            "prmt.b32 $0, $2, 0x4b00, 0x5410; prmt.b32 $1, $2, 0x4b00, 0x5432;",
            "=f,=f,r", [fraction], gl.float32, True, 2,
        )  # fmt: skip
        angle = gl.fma(shifted, 9.58738019107841e-05, -804.2477416992188)  # π / 2¹⁵ and -π · 2⁸, as float32 has π
    else:
        angle = fraction * 6.283185307179586
    return cosine_sine_of(angle, True)


@gluon.jit
def turn_of(fraction):
    """Cosine and sine of (CHUNK, pairs) phases, to fit (CHUNK, RANK, pairs)."""
    cos, sin = cosine_sine(fraction)
    return cos[:, None, :], sin[:, None, :]


@gluon.jit
def turned_rows(a0, a1, a2, b0, b1, b2, cos, sin, rest_scale, BIAS: gl.constexpr, RANK: gl.constexpr,
                PAIRS: gl.constexpr, REST: gl.constexpr):  # fmt: skip
    """Rows of B or C plus their bias, turned, the rest times rest_scale where it is given."""
    dtype: gl.constexpr = a0.dtype
    first = widened(hold(a0, True))
    second = widened(hold(a1, True))
    if BIAS:
        first += bias_of_rows(b0, RANK, PAIRS)
        second += bias_of_rows(b1, RANK, PAIRS)
    a0 = (first * cos - second * sin).to(dtype)
    a1 = (first * sin + second * cos).to(dtype)
    if REST > 0:
        rest = hold(a2, True)
        if BIAS:
            rest = widened(rest) + bias_of_rows(b2, RANK, REST)
        if rest_scale is not None:
            rest = (rest if BIAS else widened(rest)) * rest_scale
        a2 = rest.to(dtype)
    return a0, a1, a2


@gluon.jit
def bias_of_rows(bias, RANK: gl.constexpr, WIDTH: gl.constexpr):
    """(1, RANK, WIDTH) of shared memory to fit rows, in float32; what is in registers already as it is."""
    if isinstance(bias, gl.tensor):
        return bias
    else:
        return read_by_rank(bias, row_layout(WIDTH, RANK))


@gluon.jit
def share_turned(a0, a1, a2, b0, b1, b2, cos, sin, BIAS: gl.constexpr, CHUNK: gl.constexpr, RANK: gl.constexpr,
                 PAIRS: gl.constexpr, REST: gl.constexpr):  # fmt: skip
    """`turned_rows` in shared memory, each part's columns `mixed` like those of states in memory."""
    a0, a1, a2 = turned_rows(a0, a1, a2, b0, b1, b2, cos, sin, None, BIAS, RANK, PAIRS, REST)
    a0 = share_mixed(a0, CHUNK, RANK, PAIRS)
    a1 = share_mixed(a1, CHUNK, RANK, PAIRS)
    if REST > 0:
        a2 = share_mixed(a2, CHUNK, RANK, REST)
    return a0, a1, a2


@gluon.jit
def share_mixed(part, CHUNK: gl.constexpr, RANK: gl.constexpr, WIDTH: gl.constexpr):
    return share(mixed(gl.reshape(part, [64, WIDTH]), WIDTH), 64, 1, WIDTH)


@gluon.jit
def rows_of_values(raw, mimo_x, scale, RANK: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Tokens x (CHUNK, P) times mimo_x (RANK, P), both in shared memory, as rows; times their scale if it is given."""
    layout: gl.constexpr = row_layout(HEAD_DIM, RANK)
    rows = widened(read_by_token(raw, layout)) * read_by_rank(mimo_x, layout)
    if scale is not None:
        rows *= scale
    return rows.to(raw.dtype)


@gluon.jit
def share_values(raw, mimo_x, CHUNK: gl.constexpr, RANK: gl.constexpr, HEAD_DIM: gl.constexpr):
    """`rows_of_values` in shared memory; x itself without mimo_x."""
    if RANK == 1 and mimo_x is None:
        return raw
    else:
        return share(rows_of_values(raw, mimo_x, None, RANK, HEAD_DIM), CHUNK, RANK, HEAD_DIM)


@gluon.jit
def load_pair_scales(log_decay, key_log, diagonal, ids, left, KEYS_IN_ROWS: gl.constexpr, CHUNK: gl.constexpr,
                     RANK: gl.constexpr):  # fmt: skip
    """What `weight_pairs` needs of a chunk's scales, from pointers to them; its ids are 0 without documents."""
    layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, pair_layout(RANK)))
    row = gl.arange(0, CHUNK, gl.SliceLayout(1, layout))
    column = gl.arange(0, CHUNK, gl.SliceLayout(0, layout))
    if KEYS_IN_ROWS:
        of_row = gl.load(key_log + row)
        of_column = gl.load(log_decay + column)
    else:
        of_row = gl.load(log_decay + row)
        of_column = gl.load(key_log + column)
    gamma = gl.load(diagonal + row)
    id_row = 0
    id_column = 0
    if ids is not None:
        id_row = gl.load(ids + gl.minimum(row, left - 1))
        id_column = gl.load(ids + gl.minimum(column, left - 1))
    return of_row, of_column, gamma, id_row, id_column


@gluon.jit
def weight_pairs(of_row, of_column, gamma, id_row, id_column, DOCUMENTS: gl.constexpr, KEYS_IN_ROWS: gl.constexpr,
                 CHUNK: gl.constexpr, RANK: gl.constexpr):  # fmt: skip
    """Weight of every key in the output of every query of a chunk, one a pair of tokens: see `weigh_pairs` in
    `kernels/tiles.py`. From `load_pair_scales`; (CHUNK, CHUNK) in a slice of `pair_layout`.
    """
    layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, pair_layout(RANK)))
    row = gl.arange(0, CHUNK, gl.SliceLayout(1, layout))[:, None]
    column = gl.arange(0, CHUNK, gl.SliceLayout(0, layout))[None, :]
    if KEYS_IN_ROWS:
        weight = exp2(of_column[None, :] - of_row[:, None], True)
        earlier = row < column
    else:
        weight = exp2(of_row[:, None] - of_column[None, :], True)
        earlier = row > column
    if DOCUMENTS:
        earlier = earlier & (id_row[:, None] == id_column[None, :])
    return gl.where(earlier, weight, gl.where(row == column, gamma[:, None], 0.0))


@gluon.jit
def weigh(pairs, weight, CHUNK: gl.constexpr, RANK: gl.constexpr):
    """(rows, rows) products times their tokens' weights."""
    tile = gl.reshape(pairs, [CHUNK, RANK, CHUNK, RANK])
    tile = gl.convert_layout(tile, pair_layout(RANK), assert_trivial=True) * weight[:, None, :, None]
    return gl.convert_layout(gl.reshape(tile, [64, 64]), product_layout(64), assert_trivial=True)


@gluon.jit
def decay_from_start(log_decay, ids, chunk, left, CHUNK: gl.constexpr, layout: gl.constexpr):
    """Each token's decay since the chunk's start, (CHUNK,); 0 for documents that began in the chunk."""
    token = gl.arange(0, CHUNK, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    scale = exp2(gl.load(log_decay + token), True)
    if ids is not None:
        running = gl.load(ids + gl.maximum(-1, -chunk * CHUNK))
        scale = gl.where(gl.load(ids + gl.minimum(token, left - 1)) == running, scale, 0.0)
    return scale


@gluon.jit
def decay_to_end(log_decay, key_log, ids, left, CHUNK: gl.constexpr, layout: gl.constexpr):
    """What of each token's key is left at the chunk's end, (CHUNK,); 0 where another document ends the chunk."""
    token = gl.arange(0, CHUNK, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    scale = exp2(gl.load(log_decay + CHUNK - 1) - gl.load(key_log + token), True)
    if ids is not None:
        ending = gl.load(ids + gl.minimum(CHUNK - 1, left - 1))
        scale = gl.where(gl.load(ids + gl.minimum(token, left - 1)) == ending, scale, 0.0)
    return scale


@gluon.jit
def scale_tokens(product, scale, CHUNK: gl.constexpr, RANK: gl.constexpr, WIDTH: gl.constexpr):
    """A product's rows times their tokens' scale, (CHUNK,) in a slice of any `accumulator_layout`."""
    layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, accumulator_layout(WIDTH, RANK)))
    scale = gl.convert_layout(scale, layout, assert_trivial=True)[:, None, None]
    return by_row(by_token(product, CHUNK, RANK, WIDTH) * scale, CHUNK, RANK, WIDTH)


@gluon.constexpr_function
def shares_phases(rank, pairs):
    """Whether ranks share the sums over them: where a thread has eight neighbours."""
    return rank > 1 and pairs >= 32


@gluon.jit
def load_by_phase(d_phase, CHUNK: gl.constexpr, RANK: gl.constexpr, PAIRS: gl.constexpr):
    """A chunk's gradients by phase, as `rotation_gradients` takes them."""
    if shares_phases(RANK, PAIRS):
        return gl.load(d_phase + in_shares(CHUNK, RANK, PAIRS))
    else:
        return load_by_token(d_phase, PAIRS, CHUNK, PAIRS, neighbour_layout(PAIRS, RANK))


@gluon.jit
def rotation_gradients(v0, v1, v2, d0, d1, d2, fraction, earlier, d_rows, d_phase, inner, CHUNK: gl.constexpr,
                       RANK: gl.constexpr, PAIRS: gl.constexpr, REST: gl.constexpr):  # fmt: skip
    """Turn the gradients d of turned rows v back and store them, what they give by phase, and ⟨v, d⟩.

    fraction: phases in a slice of `neighbour_layout`, earlier: of `load_by_phase`, gradients by phase to add, or None.
    See `rotation_gradients`, `rotate_back` in `kernels/tiles.py`.
    """
    D_STATE: gl.constexpr = 2 * PAIRS + REST
    first = widened(neighbours_by_token(v0.load(product_layout(PAIRS)), CHUNK, RANK, PAIRS))
    second = widened(neighbours_by_token(v1.load(product_layout(PAIRS)), CHUNK, RANK, PAIRS))
    d0 = neighbours_by_token(d0, CHUNK, RANK, PAIRS)
    d1 = neighbours_by_token(d1, CHUNK, RANK, PAIRS)
    by_angle = first * d1 - second * d0
    if shares_phases(RANK, PAIRS):
        by_angle = neighbour_shares(by_angle, CHUNK, RANK, PAIRS)
        if earlier is not None:
            by_angle += earlier
        gl.store(d_phase + in_shares(CHUNK, RANK, PAIRS), by_angle)
    else:
        by_angle = gl.sum(by_angle, axis=1)
        if earlier is not None:
            by_angle += earlier
        store_by_token(d_phase, by_angle, CHUNK, PAIRS, CHUNK, PAIRS)
    by_decay = first * d0 + second * d1
    if REST > 0:
        rest = widened(neighbours_by_token(v2.load(product_layout(REST)), CHUNK, RANK, REST))
        d2 = neighbours_by_token(d2, CHUNK, RANK, REST)
        if PAIRS >= 32 and REST >= PAIRS:  # as many neighbours a thread: summed between threads once
            by_rest = gl.sum(gl.reshape(rest * d2, [CHUNK, RANK, REST // PAIRS, PAIRS]), axis=2)
            by_decay += gl.convert_layout(by_rest, by_decay.type.layout, assert_trivial=True)
            by_decay = gl.sum(by_decay, axis=2)
        else:
            by_rest = gl.sum(rest * d2, axis=2)
            by_decay = gl.sum(by_decay, axis=2)
            by_decay += gl.convert_layout(by_rest, by_decay.type.layout, assert_trivial=True)
    else:
        by_decay = gl.sum(by_decay, axis=2)
    by_decay = gl.sum(by_decay, axis=1)
    gl.store(inner + gl.arange(0, CHUNK, by_decay.type.layout), by_decay)
    cos, sin = turn_of(fraction)
    store_by_row(d_rows, d0 * cos + d1 * sin, D_STATE, PAIRS)
    store_by_row(d_rows + PAIRS, d1 * cos - d0 * sin, D_STATE, PAIRS)
    if REST > 0:
        store_by_row(d_rows + 2 * PAIRS, d2, D_STATE, REST)


@gluon.jit
def neighbours_by_token(product, CHUNK: gl.constexpr, RANK: gl.constexpr, WIDTH: gl.constexpr):
    """`neighbours` of a product (rows, WIDTH) as (CHUNK, RANK, WIDTH)."""
    tile = gl.reshape(mixed(product, WIDTH), [CHUNK, RANK, WIDTH])
    return gl.convert_layout(tile, neighbour_layout(WIDTH, RANK), assert_trivial=True)


@gluon.jit
def store_by_row(target, tile, STRIDE: gl.constexpr, WIDTH: gl.constexpr):
    """`neighbours_by_token` to 64 rows of memory, STRIDE apart."""
    rows = gl.convert_layout(gl.reshape(tile, [64, WIDTH]), neighbour_layout(WIDTH), assert_trivial=True)
    store_neighbours(target, rows, STRIDE, WIDTH)


# On the matrix units


@gluon.jit
def sum_of_tokens(tile, RANK: gl.constexpr, WIDTH: gl.constexpr):
    """Sum each rank's rows of (rows, WIDTH) in shared memory: in the first RANK rows of the product, one group.

    The matrix units sum for less than it takes to pass float32 numbers from warp to warp.
    """
    layout: gl.constexpr = left_layout(WIDTH)
    rank = gl.arange(0, 64, gl.SliceLayout(1, layout))[:, None]
    row = gl.arange(0, 64, gl.SliceLayout(0, layout))[None, :]
    selected = gl.where(row % RANK == rank, 1.0, 0.0).to(tile.dtype)
    # [ranks, rows] @ [rows, WIDTH] -> [ranks, WIDTH]
    zero = gl.zeros([64, WIDTH], gl.float32, product_layout(WIDTH))
    return warpgroup_mma(selected, tile, zero, use_acc=False, is_async=True)


@gluon.jit
def dot_over_state(a0, a1, a2, b0, b1, b2, REST: gl.constexpr):
    """[64, N] @ [64, N]ᵀ -> [64, 64], both in three parts: as many groups as there are parts."""
    product = gl.zeros([64, 64], gl.float32, product_layout(64))
    product = warpgroup_mma(a0, b0.permute((1, 0)), product, use_acc=False, is_async=True)
    product = warpgroup_mma(a1, b1.permute((1, 0)), product, is_async=True)
    if REST > 0:
        product = warpgroup_mma(a2, b2.permute((1, 0)), product, is_async=True)
    return product


@gluon.jit
def left_operand(a, WIDTH: gl.constexpr):
    """A tile in registers as the left operand of a product WIDTH wide; one in shared memory as it is."""
    if isinstance(a, gl.tensor):
        return gl.convert_layout(a, left_layout(WIDTH))
    else:
        return a


@gluon.jit
def dot_from_state(a, b0, b1, b2, PAIRS: gl.constexpr, REST: gl.constexpr):
    """[64, K] @ [K, N] -> [64, N] in three parts, a in registers or in shared memory."""
    zero = gl.zeros([64, PAIRS], gl.float32, product_layout(PAIRS))
    c0 = warpgroup_mma(left_operand(a, PAIRS), b0, zero, use_acc=False, is_async=True)
    c1 = warpgroup_mma(left_operand(a, PAIRS), b1, zero, use_acc=False, is_async=True)
    c2 = 0.0
    if REST > 0:
        rest = gl.zeros([64, REST], gl.float32, product_layout(REST))
        c2 = warpgroup_mma(left_operand(a, REST), b2, rest, use_acc=False, is_async=True)
    return c0, c1, c2


@gluon.jit
def dot_onto_state(a, b0, b1, b2, c0, c1, c2, PAIRS: gl.constexpr, REST: gl.constexpr):
    """[64, K] @ [K, N] + [64, N] -> [64, N] in three parts, a in registers."""
    c0 = warpgroup_mma(left_operand(a, PAIRS), b0, c0, is_async=True)
    c1 = warpgroup_mma(left_operand(a, PAIRS), b1, c1, is_async=True)
    if REST > 0:
        c2 = warpgroup_mma(left_operand(a, REST), b2, c2, is_async=True)
    return c0, c1, c2
