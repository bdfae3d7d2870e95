"""Pieces that every chunk kernel is built from: rotated rows of B and C, products over the state, decay weights.

A program owns one head's chunk of CHUNK tokens. The RANK rows of a token stand together, so a chunk is a tile of
ROWS = CHUNK · RANK rows. The N columns are three contiguous parts, each padded to a power of two: PAIRS first halves
and PAIRS second halves (PAIR_BLOCK wide), D_STATE − 2·PAIRS unrotated (REST_BLOCK wide). A part that is empty is the
number 0.0 and takes part in nothing. HARDWARE: whether the GPU's own exponential, sine and cosine may be used.
"""

import triton
import triton.language as tl


@triton.jit
def cosine_sine(fraction, HARDWARE: tl.constexpr):
    """Cosine and sine of a fraction of a turn: float32, or int16 in units of 2⁻¹⁶."""
    if fraction.dtype == tl.int16:
        angle = fraction.to(tl.float32) * 9.587379924285257e-05  # 2π / 2¹⁶
    else:
        angle = fraction * 6.283185307179586
    if HARDWARE:  # |angle| ≤ π, where the hardware's sine and cosine are off by at most 2⁻²⁰
        cos = tl.inline_asm_elementwise("cos.approx.ftz.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1)
        sin = tl.inline_asm_elementwise("sin.approx.ftz.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1)
    else:
        cos = tl.cos(angle)
        sin = tl.sin(angle)
    return cos, sin


@triton.jit
def load_turn(phase, token, PAIRS: tl.constexpr, PAIR_BLOCK: tl.constexpr, HARDWARE: tl.constexpr):
    """Cosine and sine of each token's angle since the start of its chunk: two (rows, PAIR_BLOCK).

    phase: (token, PAIRS) fractions of a turn.
    """
    cos = 0.0
    sin = 0.0
    if PAIRS > 0:
        pair = tl.arange(0, PAIR_BLOCK)
        fraction = tl.load(phase + token[:, None] * PAIRS + pair[None, :], mask=(pair < PAIRS)[None, :], other=0)
        cos, sin = cosine_sine(fraction, HARDWARE)
    return cos, sin


@triton.jit
def exp2(x, HARDWARE: tl.constexpr):
    """2^x; the hardware's instruction flushes results under 2⁻¹²⁶ to zero, which saves the scaling around it."""
    if HARDWARE:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return tl.exp2(x)


@triton.jit
def sigmoid(x, HARDWARE: tl.constexpr):
    if HARDWARE:
        denominator = 1.0 + exp2(x * -1.4426950408889634, HARDWARE)
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [denominator], tl.float32, True, 1)
    else:
        return tl.sigmoid(x)


@triton.jit
def load_rows(rows, row, valid, D_STATE: tl.constexpr, STRIDE: tl.constexpr, PAIRS: tl.constexpr,
              PAIR_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr):  # fmt: skip
    """Rows of a matrix with D_STATE columns, STRIDE apart, in three parts and their own dtype."""
    first = 0.0
    second = 0.0
    rest = 0.0
    if PAIRS > 0:
        pair = tl.arange(0, PAIR_BLOCK)
        at = rows + row[:, None] * STRIDE + pair[None, :]
        inside = valid[:, None] & (pair < PAIRS)[None, :]
        first = tl.load(at, mask=inside, other=0.0)
        second = tl.load(at + PAIRS, mask=inside, other=0.0)
    if D_STATE > 2 * PAIRS:
        column = tl.arange(0, REST_BLOCK)
        at = rows + row[:, None] * STRIDE + (2 * PAIRS + column)[None, :]
        rest = tl.load(at, mask=valid[:, None] & (column < D_STATE - 2 * PAIRS)[None, :], other=0.0)
    return first, second, rest


@triton.jit
def add_bias(part, bias, rank, start, width, D_STATE: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr):
    """Widen columns start … start + width of B or C to float32 and add their bias, if there is one."""
    part = part.to(tl.float32)
    if bias is not None:
        column = tl.arange(0, BLOCK)
        if RANK == 1:
            part += tl.load(bias + start + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
        else:
            at = bias + rank[:, None] * D_STATE + (start + column)[None, :]
            part += tl.load(at, mask=(column < width)[None, :], other=0.0).to(tl.float32)
    return part


@triton.jit
def rotate_rows(first, second, rest, bias, rank, cos, sin, scale, dtype: tl.constexpr, D_STATE: tl.constexpr,
                PAIRS: tl.constexpr, RANK: tl.constexpr, PAIR_BLOCK: tl.constexpr,
                REST_BLOCK: tl.constexpr):  # fmt: skip
    """Rows of B or C biased, turned by their phase and scaled, as three parts in `dtype`; scale: (rows,) or None."""
    if PAIRS > 0:
        if scale is not None:
            cos *= scale[:, None]
            sin *= scale[:, None]
        a = add_bias(first, bias, rank, 0, PAIRS, D_STATE, RANK, PAIR_BLOCK)
        b = add_bias(second, bias, rank, PAIRS, PAIRS, D_STATE, RANK, PAIR_BLOCK)
        first = (a * cos - b * sin).to(dtype)
        second = (a * sin + b * cos).to(dtype)
    if D_STATE > 2 * PAIRS:
        rest = add_bias(rest, bias, rank, 2 * PAIRS, D_STATE - 2 * PAIRS, D_STATE, RANK, REST_BLOCK)
        if scale is not None:
            rest *= scale[:, None]
        rest = rest.to(dtype)
    return first, second, rest


@triton.jit
def dot_over_state(a0, a1, a2, b0, b1, b2, PAIRS: tl.constexpr, D_STATE: tl.constexpr, PRECISION: tl.constexpr):
    """[M, N] @ [K, N]ᵀ -> [M, K], both in three parts."""
    if PAIRS > 0:
        product = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
        product = tl.dot(a1, tl.trans(b1), product, input_precision=PRECISION)
        if D_STATE > 2 * PAIRS:
            product = tl.dot(a2, tl.trans(b2), product, input_precision=PRECISION)
    else:
        product = tl.dot(a2, tl.trans(b2), input_precision=PRECISION)
    return product


@triton.jit
def dot_into_state(a, b0, b1, b2, c0, c1, c2, PAIRS: tl.constexpr, D_STATE: tl.constexpr, PRECISION: tl.constexpr):
    """[M, K] @ [K, N] + [M, N] -> [M, N] in three parts."""
    if PAIRS > 0:
        c0 = tl.dot(a, b0, c0, input_precision=PRECISION)
        c1 = tl.dot(a, b1, c1, input_precision=PRECISION)
    if D_STATE > 2 * PAIRS:
        c2 = tl.dot(a, b2, c2, input_precision=PRECISION)
    return c0, c1, c2


@triton.jit
def scale_parts(a0, a1, a2, scale, PAIRS: tl.constexpr, D_STATE: tl.constexpr):
    """Each row of three parts times its scale."""
    if PAIRS > 0:
        a0 *= scale
        a1 *= scale
    if D_STATE > 2 * PAIRS:
        a2 *= scale
    return a0, a1, a2


@triton.jit
def zero_parts(ROWS: tl.constexpr, D_STATE: tl.constexpr, PAIRS: tl.constexpr, PAIR_BLOCK: tl.constexpr,
               REST_BLOCK: tl.constexpr):  # fmt: skip
    a0 = 0.0
    a1 = 0.0
    a2 = 0.0
    if PAIRS > 0:
        a0 = tl.zeros((ROWS, PAIR_BLOCK), tl.float32)
        a1 = tl.zeros((ROWS, PAIR_BLOCK), tl.float32)
    if D_STATE > 2 * PAIRS:
        a2 = tl.zeros((ROWS, REST_BLOCK), tl.float32)
    return a0, a1, a2


@triton.jit
def store_parts(base, row, valid, a0, a1, a2, D_STATE: tl.constexpr, PAIRS: tl.constexpr, PAIR_BLOCK: tl.constexpr,
                REST_BLOCK: tl.constexpr):  # fmt: skip
    """Store three parts as rows of a contiguous (rows, D_STATE) matrix, in its dtype."""
    if PAIRS > 0:
        pair = tl.arange(0, PAIR_BLOCK)
        at = base + row[:, None] * D_STATE + pair[None, :]
        inside = valid[:, None] & (pair < PAIRS)[None, :]
        tl.store(at, a0.to(base.dtype.element_ty), mask=inside)
        tl.store(at + PAIRS, a1.to(base.dtype.element_ty), mask=inside)
    if D_STATE > 2 * PAIRS:
        column = tl.arange(0, REST_BLOCK)
        at = base + row[:, None] * D_STATE + (2 * PAIRS + column)[None, :]
        inside = valid[:, None] & (column < D_STATE - 2 * PAIRS)[None, :]
        tl.store(at, a2.to(base.dtype.element_ty), mask=inside)


@triton.jit
def rotation_gradients(v0, v1, v2, d0, d1, d2, PAIRS: tl.constexpr, D_STATE: tl.constexpr):
    """⟨v, dv⟩ of each row and its gradient by angle, for rotated rows v with gradients dv: (rows,), (rows, PAIRS)."""
    by_angle = 0.0
    if PAIRS > 0:
        v0 = v0.to(tl.float32)
        v1 = v1.to(tl.float32)
        by_angle = v0 * d1 - v1 * d0
        inner = tl.sum(v0 * d0 + v1 * d1, axis=1)
        if D_STATE > 2 * PAIRS:
            inner += tl.sum(v2.to(tl.float32) * d2, axis=1)
    else:
        inner = tl.sum(v2.to(tl.float32) * d2, axis=1)
    return inner, by_angle


@triton.jit
def rotate_back(d0, d1, phase, token, PAIRS: tl.constexpr, PAIR_BLOCK: tl.constexpr, HARDWARE: tl.constexpr):
    """Gradients of rotated rows, turned back into gradients of the rows before rotation."""
    if PAIRS > 0:
        cos, sin = load_turn(phase, token, PAIRS, PAIR_BLOCK, HARDWARE)
        first = d0 * cos + d1 * sin
        d1 = d1 * cos - d0 * sin
        d0 = first
    return d0, d1


@triton.jit
def pair_weights(log_decay_t, key_log_s, diagonal_t, t, s, id_t, id_s, DOCUMENTS: tl.constexpr,
                 HARDWARE: tl.constexpr):  # fmt: skip
    """Weight of key s in the output of t: decay · f_s for earlier tokens of t's document, γ_t for t itself.

    The key scale sits in key_log = log2(decay) − log2(f), so it costs no product, and f = 0 gives exp2(−∞) = 0.
    """
    earlier = s < t
    if DOCUMENTS:
        earlier &= id_s == id_t
    return tl.where(earlier, exp2(log_decay_t - key_log_s, HARDWARE), tl.where(s == t, diagonal_t, 0.0))


@triton.jit
def load_per_rank(weights, rank, RANK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """One head's (RANK, HEAD_DIM) weights, spread to the rows of a tile (one row for all where RANK is 1)."""
    column = tl.arange(0, HEAD_DIM)
    if RANK == 1:
        return tl.load(weights + column).to(tl.float32)[None, :]
    else:
        return tl.load(weights + rank[:, None] * HEAD_DIM + column[None, :]).to(tl.float32)


@triton.jit
def sum_ranks(rows, CHUNK: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr):
    """(CHUNK · RANK, WIDTH) -> (CHUNK, WIDTH)."""
    if RANK == 1:
        return rows
    else:
        return tl.sum(tl.reshape(rows, (CHUNK, RANK, WIDTH)), axis=1)


@triton.jit
def sum_tokens(rows, rank, dtype: tl.constexpr, RANK_BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """Sum each rank's rows of a tile: (rows, P) -> (RANK_BLOCK, P), the ranks padded to the 16 rows of a product."""
    selected = tl.where(tl.arange(0, RANK_BLOCK)[:, None] == rank[None, :], 1.0, 0.0)
    # [ranks, rows] @ [rows, P] -> [ranks, P]
    return tl.dot(selected.to(dtype), rows.to(dtype), input_precision=PRECISION)


@triton.jit
def load_ids(document_ids, start, token, left):
    """Document of each token of a chunk, padding counted to the last one; 0 without documents."""
    ids = 0 * token
    if document_ids is not None:
        ids = tl.load(document_ids + start + tl.minimum(token, left - 1))
    return ids


@triton.jit
def load_tokens(x, token, valid, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Each row's token of one head of a (tokens, HEADS, P) tensor: (rows, P)."""
    column = tl.arange(0, HEAD_DIM)
    return tl.load(x + token[:, None] * (HEADS * HEAD_DIM) + column[None, :], mask=valid[:, None], other=0.0)


@triton.jit
def weigh_values(x, mimo_x, rank, RANK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Rows of x times mimo_x, where there is one, in x's dtype."""
    if mimo_x is not None:
        return (x.to(tl.float32) * load_per_rank(mimo_x, rank, RANK, HEAD_DIM)).to(x.dtype)
    else:
        return x
