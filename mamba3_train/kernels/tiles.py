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
    return cosine_sine_of(angle, HARDWARE)


@triton.jit
def cosine_sine_of(angle, HARDWARE: tl.constexpr):
    """Cosine and sine of an angle of at most a turn; by the hardware off by at most 2⁻²⁰ within half a turn."""
    if HARDWARE:
        cos = tl.inline_asm_elementwise("cos.approx.ftz.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1)
        sin = tl.inline_asm_elementwise("sin.approx.ftz.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1)
    else:
        cos = tl.cos(angle)
        sin = tl.sin(angle)
    return cos, sin


@triton.jit
def by_token(rows, CHUNK: tl.constexpr, RANK: tl.constexpr):
    """(CHUNK · RANK, width) -> (CHUNK, RANK, width), or the same at rank 1."""
    if RANK == 1:
        return rows
    else:
        return tl.reshape(rows, (CHUNK, RANK, rows.shape[1]))


@triton.jit
def by_row(tile, CHUNK: tl.constexpr, RANK: tl.constexpr):
    """The way back from `by_token`."""
    if RANK == 1:
        return tile
    else:
        return tl.reshape(tile, (CHUNK * RANK, tile.shape[2]))


@triton.jit
def for_ranks(tokens, RANK: tl.constexpr):
    """(CHUNK, width), the same for all ranks of a token, to fit `by_token`."""
    if RANK == 1:
        return tokens
    else:
        return tokens[:, None, :]


@triton.jit
def for_tokens(ranks, RANK: tl.constexpr):
    """(RANK, width), the same for all tokens, to fit `by_token`."""
    if RANK == 1:
        return ranks
    else:
        return ranks[None, :, :]


@triton.jit
def load_phase(phase, PAIRS: tl.constexpr, CHUNK: tl.constexpr, PAIR_BLOCK: tl.constexpr):
    """Each token's angle since the start of its chunk, from phase (CHUNK, PAIRS): (CHUNK, PAIR_BLOCK)."""
    fraction = 0.0
    if PAIRS > 0:
        pair = tl.arange(0, PAIR_BLOCK)
        at = tl.arange(0, CHUNK)[:, None] * PAIRS + pair[None, :]
        fraction = tl.load(phase + at, mask=(pair < PAIRS)[None, :], other=0)
    return fraction


@triton.jit
def turn_of(fraction, PAIRS: tl.constexpr, HARDWARE: tl.constexpr):
    """Cosine and sine of held phases."""
    cos = 0.0
    sin = 0.0
    if PAIRS > 0:
        cos, sin = cosine_sine(hold(fraction, HARDWARE), HARDWARE)
    return cos, sin


@triton.jit
def hold(tile, HARDWARE: tl.constexpr):
    """The same tile, used no earlier than here.

    Triton moves what a load feeds (a store to shared memory, a barrier) right behind the load, so that each load waits
    for the one before. Held once all loads of a program are issued, they are in flight together.
    """
    if HARDWARE:
        pack: tl.constexpr = 32 // tile.dtype.primitive_bitwidth
        tile = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [tile], tile.dtype, False, pack)
    return tile


@triton.jit
def hold_parts(a0, a1, a2, PAIRS: tl.constexpr, D_STATE: tl.constexpr, HARDWARE: tl.constexpr):
    if PAIRS > 0:
        a0 = hold(a0, HARDWARE)
        a1 = hold(a1, HARDWARE)
    if D_STATE > 2 * PAIRS:
        a2 = hold(a2, HARDWARE)
    return a0, a1, a2


@triton.jit
def fetch_ahead(pointer, BYTES: tl.constexpr):
    """Ask for BYTES (a multiple of 16) of contiguous memory to be in the L2 cache soon; needs Hopper or later."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;"
        " @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }",
        "=r,l,r", [pointer.to(tl.int64), BYTES], tl.int32, False, 1,
    )  # fmt: skip


@triton.jit
def fetch_tokens_ahead(x, left, CHUNK: tl.constexpr, TOKEN_STRIDE: tl.constexpr):
    """The same for what `load_tokens` loads."""
    token = tl.minimum(tl.arange(0, CHUNK), left - 1)
    address = (x + token * TOKEN_STRIDE).to(tl.int64)
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], tl.int32, False, 1)


@triton.jit
def fetch_chunk_ahead(state, rows, phase, x, z, seqlen, chunks, head_start, SLOTS, HEADS: tl.constexpr,
                      HEADS_HERE: tl.constexpr, HEAD_DIM: tl.constexpr, D_STATE: tl.constexpr, PAIRS: tl.constexpr,
                      RANK: tl.constexpr, CHUNK: tl.constexpr, TOKEN_STRIDE: tl.constexpr,
                      AHEAD: tl.constexpr):  # fmt: skip
    """Bring into the L2 cache what the program AHEAD of this one loads: a program has no registers to load it itself.

    state: (batch, SLOTS, HEADS_HERE, P, N), rows: (batch, HEADS_HERE, padded length · RANK, P), phase, x, z; any None.
    """
    program = tl.minimum(tl.program_id(0) + AHEAD, tl.num_programs(0) - 1)
    chunk = program // HEADS_HERE
    here = program % HEADS_HERE
    batch = tl.program_id(1).to(tl.int64)
    left = seqlen - chunk * CHUNK
    head = head_start + here
    tokens = (batch * seqlen + chunk * CHUNK) * TOKEN_STRIDE + head * HEAD_DIM
    if state is not None:
        bytes: tl.constexpr = HEAD_DIM * D_STATE * state.dtype.element_ty.primitive_bitwidth // 8
        fetch_ahead(state + ((batch * SLOTS + chunk) * HEADS_HERE + here) * (HEAD_DIM * D_STATE), bytes)
    if rows is not None:
        row_bytes: tl.constexpr = CHUNK * RANK * HEAD_DIM * rows.dtype.element_ty.primitive_bitwidth // 8
        fetch_ahead(rows + ((batch * HEADS_HERE + here) * chunks + chunk) * (CHUNK * RANK * HEAD_DIM), row_bytes)
    if PAIRS % 8 == 0 and PAIRS > 0:
        phase_bytes: tl.constexpr = CHUNK * PAIRS * phase.dtype.element_ty.primitive_bitwidth // 8
        fetch_ahead(phase + ((batch * HEADS + head) * chunks + chunk) * (CHUNK * PAIRS), phase_bytes)
    fetch_tokens_ahead(x + tokens, left, CHUNK, TOKEN_STRIDE)
    if z is not None:
        fetch_tokens_ahead(z + tokens, left, CHUNK, TOKEN_STRIDE)


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
def load_bias(bias, head, D_STATE: tl.constexpr, PAIRS: tl.constexpr, RANK: tl.constexpr, PAIR_BLOCK: tl.constexpr,
              REST_BLOCK: tl.constexpr):  # fmt: skip
    """A head's bias of B or C in three parts, (RANK, width); 0.0 without a bias."""
    first = 0.0
    second = 0.0
    rest = 0.0
    if bias is not None:
        rank = tl.arange(0, RANK)
        first, second, rest = load_rows(
            bias + head * (RANK * D_STATE), rank, rank >= 0, D_STATE, D_STATE, PAIRS, PAIR_BLOCK, REST_BLOCK
        )
    return first, second, rest


@triton.jit
def rotate_rows(a0, a1, a2, b0, b1, b2, cos, sin, scale, BIAS: tl.constexpr, dtype: tl.constexpr, PAIRS: tl.constexpr,
                D_STATE: tl.constexpr, CHUNK: tl.constexpr, RANK: tl.constexpr):  # fmt: skip
    """Rows a of B or C plus their bias b, turned and scaled, as three parts in `dtype`; scale: (CHUNK,) or None."""
    if PAIRS > 0:
        if scale is not None:
            cos *= scale[:, None]
            sin *= scale[:, None]
        cos = for_ranks(cos, RANK)
        sin = for_ranks(sin, RANK)
        first = by_token(a0, CHUNK, RANK).to(tl.float32)
        second = by_token(a1, CHUNK, RANK).to(tl.float32)
        if BIAS:
            first += for_tokens(b0, RANK)
            second += for_tokens(b1, RANK)
        a0 = by_row((first * cos - second * sin).to(dtype), CHUNK, RANK)
        a1 = by_row((first * sin + second * cos).to(dtype), CHUNK, RANK)
    if D_STATE > 2 * PAIRS:
        rest = by_token(a2, CHUNK, RANK).to(tl.float32)
        if BIAS:
            rest += for_tokens(b2, RANK)
        if scale is not None:
            rest *= for_ranks(scale[:, None], RANK)
        a2 = by_row(rest.to(dtype), CHUNK, RANK)
    return a0, a1, a2


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
def rotate_back(d0, d1, cos, sin, PAIRS: tl.constexpr, CHUNK: tl.constexpr, RANK: tl.constexpr):
    """Gradients of rotated rows, turned back into gradients of the rows before rotation."""
    if PAIRS > 0:
        d0 = by_token(d0, CHUNK, RANK)
        d1 = by_token(d1, CHUNK, RANK)
        cos = for_ranks(cos, RANK)
        sin = for_ranks(sin, RANK)
        first = d0 * cos + d1 * sin
        d1 = by_row(d1 * cos - d0 * sin, CHUNK, RANK)
        d0 = by_row(first, CHUNK, RANK)
    return d0, d1


@triton.jit
def weigh_pairs(pairs, log_decay_t, key_log_s, diagonal_t, t, s, id_t, id_s, DOCUMENTS: tl.constexpr,
                HARDWARE: tl.constexpr, CHUNK: tl.constexpr, RANK: tl.constexpr):  # fmt: skip
    """(rows, rows) products of queries and keys times the weight of key s in the output of t, given by token.

    The weight is decay · f_s for earlier tokens of t's document and γ_t for t itself. The key scale sits in key_log =
    log2(decay) − log2(f), so it costs no product, and f = 0 gives exp2(−∞) = 0.
    """
    earlier = s < t
    if DOCUMENTS:
        earlier &= id_s == id_t
    weight = tl.where(earlier, exp2(log_decay_t - key_log_s, HARDWARE), tl.where(s == t, diagonal_t, 0.0))
    if RANK == 1:
        return pairs * weight
    else:
        weighed = tl.reshape(pairs, (CHUNK, RANK, CHUNK, RANK)) * weight[:, None, :, None]
        return tl.reshape(weighed, (CHUNK * RANK, CHUNK * RANK))


@triton.jit
def load_ranks(weights, head, RANK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """One head's (RANK, HEAD_DIM) weights in float32."""
    at = tl.arange(0, RANK)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    return tl.load(weights + head * (RANK * HEAD_DIM) + at).to(tl.float32)


@triton.jit
def sum_ranks(rows, CHUNK: tl.constexpr, RANK: tl.constexpr):
    """(CHUNK · RANK, width) -> (CHUNK, width), or one number a row -> one a token."""
    if RANK == 1:
        return rows
    elif len(rows.shape) == 1:
        return tl.sum(tl.reshape(rows, (CHUNK, RANK)), axis=1)
    else:
        return tl.sum(tl.reshape(rows, (CHUNK, RANK, rows.shape[1])), axis=1)


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
def load_tokens(x, left, CHUNK: tl.constexpr, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """One head of a chunk's tokens, which lie STRIDE apart: (CHUNK, P), zero past the sequence's end."""
    token = tl.arange(0, CHUNK)[:, None]
    return tl.load(x + token * STRIDE + tl.arange(0, HEAD_DIM)[None, :], mask=token < left, other=0.0)


@triton.jit
def weigh_values(x, mimo_x, MIMO: tl.constexpr, CHUNK: tl.constexpr, RANK: tl.constexpr):
    """Rows of x times mimo_x, where there is one, in x's dtype: (rows, P)."""
    if MIMO:
        return by_row((for_ranks(x.to(tl.float32), RANK) * for_tokens(mimo_x, RANK)).to(x.dtype), CHUNK, RANK)
    else:
        return x
