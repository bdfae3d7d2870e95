"""The decode step with its products on the matrix units; the recurrence and its symbols are in decode_step.py.

    H ← α R(−φ) H + [v', v]ᵀ [α R(−φ) b'; b]        y = H cᵀ        v_r = weight · mimo_x_r ⊙ x, likewise v'

A program owns ROWS rows of P of one head of one sequence, each warp 16 of them. The state is in three parts, as in
tiles.py. Loaded and stored in 16-byte pieces, it would lie otherwise in the registers than a product's sums do. But
which row and column of a product stands for which of the state is free: with `_to_product`'s choice each thread holds
from the start what the product wants of it, and the state never passes through shared memory.

Products take x's dtype and add in float32. For 16-bit x, a row of B or C with its bias is two rows (HALVES = 2), what
the dtype holds of it and what that leaves: they fill rows that the least size of a product would leave empty.
"""

import triton
import triton.language as tl

from mamba3_train.kernels.tiles import cosine_sine, dot_into_state, dot_over_state, exp2, fetch_ahead, hold, sigmoid


@triton.jit
def _part_at(column: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, D_STATE: tl.constexpr,
             VECTOR: tl.constexpr):  # fmt: skip
    """Offsets of one part within a program's rows, as it is loaded, (ROWS, groups, WIDTH), and which columns exist."""
    WIDTH: tl.constexpr = min(BLOCK, 4 * VECTOR)
    i = tl.arange(0, ROWS)
    row = i // 8 % (ROWS // 16) * 16 + i // (ROWS // 2) * 8 + i % 8
    at = tl.arange(0, BLOCK // WIDTH)[None, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    return row[:, None, None] * D_STATE + column + at, at < SIZE


@triton.jit
def _to_product(tile, BLOCK: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr, HARDWARE: tl.constexpr):
    """A part as it was loaded, held -> (ROWS, BLOCK) float32, rows in their order and columns in that of `_columns`."""
    WIDTH: tl.constexpr = min(BLOCK, 4 * VECTOR)
    if HARDWARE and tile.dtype == tl.bfloat16:  # as `hold`, two numbers of a register by one instruction each
        tile = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [tile], tl.float32, False, 2
        )
    else:
        tile = hold(tile, HARDWARE).to(tl.float32)
    tile = tl.reshape(tile, (2, ROWS // 16, 8, BLOCK // WIDTH, 4, WIDTH // 8, 2))
    return tl.reshape(tl.permute(tile, (1, 0, 2, 3, 5, 4, 6)), (ROWS, BLOCK))


@triton.jit
def _from_product(tile, BLOCK: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr):
    """The way back from `_to_product`'s rows and columns."""
    WIDTH: tl.constexpr = min(BLOCK, 4 * VECTOR)
    tile = tl.reshape(tile, (ROWS // 16, 2, 8, BLOCK // WIDTH, WIDTH // 8, 4, 2))
    return tl.reshape(tl.permute(tile, (1, 0, 2, 3, 5, 4, 6)), (ROWS, BLOCK // WIDTH, WIDTH))


@triton.jit
def _load_state(state, PAIRS: tl.constexpr, D_STATE: tl.constexpr, PAIR_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
                ROWS: tl.constexpr, VECTOR: tl.constexpr):  # fmt: skip
    h0 = 0.0
    h1 = 0.0
    h2 = 0.0
    if PAIRS > 0:
        at, inside = _part_at(0, PAIRS, PAIR_BLOCK, ROWS, D_STATE, VECTOR)
        h0 = tl.load(state + at, mask=inside, other=0.0)
        h1 = tl.load(state + at + PAIRS, mask=inside, other=0.0)
    if D_STATE > 2 * PAIRS:
        at, inside = _part_at(2 * PAIRS, D_STATE - 2 * PAIRS, REST_BLOCK, ROWS, D_STATE, VECTOR)
        h2 = tl.load(state + at, mask=inside, other=0.0)
    return h0, h1, h2


@triton.jit
def _fetch_state_ahead(state, SIZE: tl.constexpr, AHEAD: tl.constexpr):
    """Ask for what the program AHEAD of this one loads of the state, SIZE elements, to be in the L2 cache."""
    bytes: tl.constexpr = SIZE * state.dtype.element_ty.primitive_bitwidth // 8
    if tl.program_id(0) + AHEAD < tl.num_programs(0):
        fetch_ahead(state + AHEAD * SIZE, bytes)


@triton.jit
def _store_state(state, h0, h1, h2, PAIRS: tl.constexpr, D_STATE: tl.constexpr, PAIR_BLOCK: tl.constexpr,
                 REST_BLOCK: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr):  # fmt: skip
    dtype: tl.constexpr = state.dtype.element_ty
    if PAIRS > 0:
        at, inside = _part_at(0, PAIRS, PAIR_BLOCK, ROWS, D_STATE, VECTOR)
        tl.store(state + at, _from_product(h0.to(dtype), PAIR_BLOCK, ROWS, VECTOR), mask=inside)
        tl.store(state + at + PAIRS, _from_product(h1.to(dtype), PAIR_BLOCK, ROWS, VECTOR), mask=inside)
    if D_STATE > 2 * PAIRS:
        at, inside = _part_at(2 * PAIRS, D_STATE - 2 * PAIRS, REST_BLOCK, ROWS, D_STATE, VECTOR)
        tl.store(state + at, _from_product(h2.to(dtype), REST_BLOCK, ROWS, VECTOR), mask=inside)


@triton.jit
def _columns(BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """The column of a part that each column of a product stands for: (BLOCK,)."""
    WIDTH: tl.constexpr = min(BLOCK, 4 * VECTOR)
    n = tl.arange(0, BLOCK)
    column = n // WIDTH * WIDTH + n // 2 % 4 * (WIDTH // 4) + n % WIDTH // 8 * 2 + n % 2
    return tl.max_contiguous(tl.multiple_of(column, [2]), [2])


@triton.jit
def _load_rows(rows, valid, pair, rest, PAIRS: tl.constexpr, D_STATE: tl.constexpr):
    """Rows, given by their addresses, in three parts with these columns; 0.0 for a part that is empty."""
    a0 = 0.0
    a1 = 0.0
    a2 = 0.0
    if PAIRS > 0:
        inside = valid[:, None] & (pair < PAIRS)[None, :]
        a0 = tl.load(rows[:, None] + pair[None, :], mask=inside, other=0.0)
        a1 = tl.load(rows[:, None] + (PAIRS + pair)[None, :], mask=inside, other=0.0)
    if D_STATE > 2 * PAIRS:
        inside = valid[:, None] & (rest < D_STATE - 2 * PAIRS)[None, :]
        a2 = tl.load(rows[:, None] + (2 * PAIRS + rest)[None, :], mask=inside, other=0.0)
    return a0, a1, a2


@triton.jit
def _add_bias(a0, a1, a2, b0, b1, b2, BIAS: tl.constexpr, PAIRS: tl.constexpr, D_STATE: tl.constexpr,
              HARDWARE: tl.constexpr):  # fmt: skip
    """Rows, held, in float32, and their bias if they have one."""
    if PAIRS > 0:
        a0 = hold(a0, HARDWARE).to(tl.float32)
        a1 = hold(a1, HARDWARE).to(tl.float32)
        if BIAS:
            a0 += hold(b0, HARDWARE)
            a1 += hold(b1, HARDWARE)
    if D_STATE > 2 * PAIRS:
        a2 = hold(a2, HARDWARE).to(tl.float32)
        if BIAS:
            a2 += hold(b2, HARDWARE)
    return a0, a1, a2


@triton.jit
def _turn(a0, a1, a2, cos, sin, scale, PAIRS: tl.constexpr, D_STATE: tl.constexpr):
    """scale R(−φ) a, with the scale in cos and sin already."""
    if PAIRS > 0:
        first = a0 * cos + a1 * sin
        a1 = a1 * cos - a0 * sin
        a0 = first
    if D_STATE > 2 * PAIRS:
        a2 *= scale
    return a0, a1, a2


@triton.jit
def _operand(rows, low, dtype: tl.constexpr, HALVES: tl.constexpr):
    """float32 rows in a product's dtype; with two HALVES what it holds of a row, or where `low` what that leaves."""
    if HALVES == 2:
        bits: tl.constexpr = -(2**16) if dtype == tl.bfloat16 else -(2**13)
        high = (rows.to(tl.int32, bitcast=True) & bits).to(tl.float32, bitcast=True)
        rows = tl.where(low[:, None], rows - high, high)
    return rows.to(dtype)


@triton.jit
def _operands(a0, a1, a2, low, dtype: tl.constexpr, HALVES: tl.constexpr, PAIRS: tl.constexpr, D_STATE: tl.constexpr):
    if PAIRS > 0:
        a0 = _operand(a0, low, dtype, HALVES)
        a1 = _operand(a1, low, dtype, HALVES)
    if D_STATE > 2 * PAIRS:
        a2 = _operand(a2, low, dtype, HALVES)
    return a0, a1, a2


@triton.jit
def _add_products(h0, h1, h2, keyed, b0, b1, b2, c0, c1, c2, dtype: tl.constexpr, PRECISION: tl.constexpr,
                  PAIRS: tl.constexpr, D_STATE: tl.constexpr):  # fmt: skip
    """The state after the token and what the queries c read of it."""
    # [P, keys] @ [keys, N] + [P, N] -> [P, N]
    h0, h1, h2 = dot_into_state(keyed, b0, b1, b2, h0, h1, h2, PAIRS, D_STATE, PRECISION)
    a0 = 0.0
    a1 = 0.0
    a2 = 0.0
    if PAIRS > 0:
        a0 = h0.to(dtype)
        a1 = h1.to(dtype)
    if D_STATE > 2 * PAIRS:
        a2 = h2.to(dtype)
    # [P, N] @ [queries, N]ᵀ -> [P, queries]
    return h0, h1, h2, dot_over_state(a0, a1, a2, c0, c1, c2, PAIRS, D_STATE, PRECISION)


@triton.jit
def decode_products_kernel(
    x, B, C, dt, A, trap, angles, B_bias, C_bias, D, z, mimo_x, mimo_z, mimo_o, norm_weight, ssm, B_before, x_before,
    out, norm_eps,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, D_STATE: tl.constexpr, PAIRS: tl.constexpr,
    RANK: tl.constexpr, PAIR_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr,
    HALVES: tl.constexpr, AHEAD: tl.constexpr, TOKEN_STRIDE: tl.constexpr, TRAP_STRIDE: tl.constexpr,
    ANGLES_STRIDE: tl.constexpr, FIXED_ANGLES: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Shapes as in `step.mamba3_step`; *_STRIDE: elements from one sequence's numbers to the next one's; AHEAD: how
    many programs ahead to fetch the state into the L2 cache."""
    PRECISION: tl.constexpr = "tf32x3" if HALVES == 1 else "tf32"  # of float32 operands only
    dtype: tl.constexpr = x.dtype.element_ty
    blocks: tl.constexpr = HEAD_DIM // ROWS
    head = tl.program_id(0) // blocks % HEADS
    batch = (tl.program_id(0) // (blocks * HEADS)).to(tl.int64)
    state = ssm + tl.program_id(0).to(tl.int64) * (ROWS * D_STATE)
    h0, h1, h2 = _load_state(state, PAIRS, D_STATE, PAIR_BLOCK, REST_BLOCK, ROWS, VECTOR)
    if AHEAD > 0:
        _fetch_state_ahead(state, ROWS * D_STATE, AHEAD)
    # Else the assembler moves these loads, which take longest, behind arithmetic that does not need them.
    tl.debug_barrier()

    # Keys: each rank of the token before, then each of this one. All loads are issued before the first is held.
    KEYS: tl.constexpr = max(16, 2 * RANK * HALVES)
    key = tl.arange(0, KEYS) // HALVES
    key_low = tl.arange(0, KEYS) % HALVES == 1
    earlier = key < RANK
    known = (key < 2 * RANK) if trap is not None else (key >= RANK) & (key < 2 * RANK)
    pair = _columns(PAIR_BLOCK, VECTOR)
    rest = _columns(REST_BLOCK, VECTOR)
    shared = (batch * (RANK * GROUPS) + head // (HEADS // GROUPS)) * D_STATE  # rank 0's row of B and C
    weights = head * (RANK * HEAD_DIM)
    biases = head * (RANK * D_STATE)
    rows = B if trap is None else tl.where(earlier, B_before, B)
    rows += shared + key % RANK * (GROUPS * D_STATE)
    b0, b1, b2 = _load_rows(rows, known, pair, rest, PAIRS, D_STATE)
    d0, d1, d2 = 0.0, 0.0, 0.0
    if B_bias is not None:
        d0, d1, d2 = _load_rows(B_bias + biases + key % RANK * D_STATE, known, pair, rest, PAIRS, D_STATE)
    QUERIES: tl.constexpr = max(8, RANK * HALVES)
    query = tl.arange(0, QUERIES) // HALVES
    query_low = tl.arange(0, QUERIES) % HALVES == 1
    asked = query < RANK
    c0, c1, c2 = _load_rows(C + shared + query * (GROUPS * D_STATE), asked, pair, rest, PAIRS, D_STATE)
    e0, e1, e2 = 0.0, 0.0, 0.0
    if C_bias is not None:
        e0, e1, e2 = _load_rows(C_bias + biases + query * D_STATE, asked, pair, rest, PAIRS, D_STATE)
    if PAIRS > 0:
        angles = angles if FIXED_ANGLES else angles + batch * ANGLES_STRIDE
        angle = tl.load(angles + pair, mask=pair < PAIRS, other=0.0)[None, :]

    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    column = head * HEAD_DIM + row
    x_before += batch * (HEADS * HEAD_DIM)
    step = tl.load(dt + batch * HEADS + head).to(tl.float32)
    log_decay = step * tl.load(A + batch * HEADS + head).to(tl.float32)
    value = tl.load(x + batch * TOKEN_STRIDE + column)
    rank = tl.arange(0, QUERIES // HALVES)
    at = weights + row[:, None] + rank[None, :] * HEAD_DIM
    is_rank = (rank < RANK)[None, :]
    if trap is not None:
        share = tl.load(trap + batch * TRAP_STRIDE + head).to(tl.float32)
        value_before = tl.load(x_before + column)
    if mimo_x is not None:
        key_at = weights + (key % RANK)[:, None] * HEAD_DIM + row[None, :]
        key_weight = tl.load(mimo_x + key_at, mask=known[:, None], other=0.0)
        weight = tl.load(mimo_x + at, mask=is_rank, other=0.0)
    if z is not None:
        gate = tl.load(z + batch * TOKEN_STRIDE + column)
    if mimo_z is not None:
        gate_weight = tl.load(mimo_z + at, mask=is_rank, other=0.0)
    if mimo_o is not None:
        out_weight = tl.load(mimo_o + at, mask=is_rank, other=0.0)
    if norm_weight is not None:
        scale = tl.load(norm_weight + column)
    if D is not None:
        skip = tl.load(D + head)

    b0, b1, b2 = _add_bias(b0, b1, b2, d0, d1, d2, B_bias is not None, PAIRS, D_STATE, HARDWARE)
    c0, c1, c2 = _add_bias(c0, c1, c2, e0, e1, e2, C_bias is not None, PAIRS, D_STATE, HARDWARE)
    x_now = hold(value, HARDWARE).to(tl.float32)
    keyed = x_now[None, :] * step
    if trap is not None:
        gamma = sigmoid(share, HARDWARE) * step
        x_then = hold(value_before, HARDWARE).to(tl.float32) * (step - gamma)
        keyed = tl.where(earlier[:, None], x_then[None, :], (x_now * gamma)[None, :])
    if D is not None:
        skip = (x_now * skip)[:, None]
    if mimo_x is not None:
        keyed *= hold(key_weight, HARDWARE)
        if D is not None:
            skip *= hold(weight, HARDWARE)
    else:
        keyed = tl.where(known[:, None], keyed, 0.0)
    if z is not None:
        gate = hold(gate, HARDWARE).to(tl.float32)[:, None]
        if mimo_z is not None:
            gate *= hold(gate_weight, HARDWARE)
        gate *= sigmoid(gate, HARDWARE)
    if mimo_o is not None:
        out_weight = hold(out_weight, HARDWARE)
        gate = out_weight if z is None else gate * out_weight

    alpha = exp2(log_decay * 1.4426950408889634, HARDWARE)
    cos, sin, key_cos, key_sin = 0.0, 0.0, 0.0, 0.0
    if PAIRS > 0:
        angle = hold(angle, HARDWARE).to(tl.float32)
        # Radians / 2π, or π · tanh(angle) · dt / 2π.
        turns = angle * 0.15915494309189535 if FIXED_ANGLES else sigmoid(2 * angle, HARDWARE) * step - 0.5 * step
        cos, sin = cosine_sine(turns - tl.floor(turns + 0.5), HARDWARE)
        cos *= alpha
        sin *= alpha
        key_cos = tl.where(earlier[:, None], cos, 1.0)
        key_sin = tl.where(earlier[:, None], sin, 0.0)
    key_scale = tl.where(earlier, alpha, 1.0)[:, None]
    b0, b1, b2 = _turn(b0, b1, b2, key_cos, key_sin, key_scale, PAIRS, D_STATE)
    b0, b1, b2 = _operands(b0, b1, b2, key_low, dtype, HALVES, PAIRS, D_STATE)
    c0, c1, c2 = _operands(c0, c1, c2, query_low, dtype, HALVES, PAIRS, D_STATE)
    if PAIRS > 0:
        h0 = _to_product(h0, PAIR_BLOCK, ROWS, VECTOR, HARDWARE)
        h1 = _to_product(h1, PAIR_BLOCK, ROWS, VECTOR, HARDWARE)
    if D_STATE > 2 * PAIRS:
        h2 = _to_product(h2, REST_BLOCK, ROWS, VECTOR, HARDWARE)
    h0, h1, h2 = _turn(h0, h1, h2, cos, sin, alpha, PAIRS, D_STATE)
    keyed = tl.trans(keyed.to(dtype))
    h0, h1, h2, y = _add_products(h0, h1, h2, keyed, b0, b1, b2, c0, c1, c2, dtype, PRECISION, PAIRS, D_STATE)
    if HALVES == 2:
        y = tl.sum(tl.reshape(y, (ROWS, QUERIES // 2, 2)), axis=2)
    if D is not None:
        y += skip
    if norm_weight is not None:
        y *= tl.rsqrt(tl.sum(y * y, axis=0) / HEAD_DIM + norm_eps)[None, :] * hold(scale, HARDWARE)[:, None]
    if z is not None or mimo_o is not None:
        y *= gate
    total = tl.sum(tl.where(is_rank, y, 0.0), axis=1)
    # Each warp has read x_before, and of a small state what several warps hold, before one of them overwrites it.
    tl.debug_barrier()
    _store_state(state, h0, h1, h2, PAIRS, D_STATE, PAIR_BLOCK, REST_BLOCK, ROWS, VECTOR)
    tl.store(x_before + column, x_now.to(x_before.dtype.element_ty))
    tl.store(out + batch * (HEADS * HEAD_DIM) + column, total.to(out.dtype.element_ty))
