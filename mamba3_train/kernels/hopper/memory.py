"""Ways of the Hopper kernels' tiles between memory, shared memory and registers.

What limits these kernels is the path between registers, L1 and shared memory: a load that touches many lines, or that
several threads repeat, costs as much as one that brings new bytes. So whatever is not in rows of 128 bytes, or is
needed in a product's layout, is copied to shared memory first and read from there.

The N columns are three parts as in `kernels/tiles.py`, PAIRS, PAIRS and REST wide, without padding. REST may be 0: then
the third part is 0.0 and takes part in nothing.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy

from mamba3_train.kernels import tiles
from mamba3_train.kernels.hopper.layouts import (
    accumulator_layout,
    copy_layout,
    neighbour_layout,
    operand_layout,
    product_layout,
    row_layout,
    share_layout,
    weight_layout,
)

fetch_ahead = gluon.jit(tiles.fetch_ahead.fn)


# From memory


@gluon.jit
def place_of_program(seqlen, chunks, head_start, HEADS: gl.constexpr, HEADS_HERE: gl.constexpr, GROUPS: gl.constexpr,
                     D_STATE: gl.constexpr, RANK: gl.constexpr, CHUNK: gl.constexpr):  # fmt: skip
    """A program's chunk, head of the pass, row of the batch and head of all, and where its tokens begin.

    start, left: the chunk's first token among all rows', and how many from there to the row's end. scalars: the chunk's
    first number in what has one a token and head, padded. keys: its first row of B and C.
    """
    chunk = gl.program_id(0) // HEADS_HERE
    here = gl.program_id(0) % HEADS_HERE
    batch = gl.program_id(1).to(gl.int64)
    head = head_start + here
    start = batch * seqlen + chunk * CHUNK
    left = seqlen - chunk * CHUNK
    scalars = (batch * HEADS + head) * chunks * CHUNK + chunk * CHUNK
    keys = start * (RANK * GROUPS * D_STATE) + head // (HEADS // GROUPS) * D_STATE
    return chunk, here, batch, head, start, left, scalars, keys


@gluon.jit
def load_rows(rows, left, STRIDE: gl.constexpr, CHUNK: gl.constexpr, RANK: gl.constexpr, WIDTH: gl.constexpr):
    """WIDTH columns of a chunk's rows, STRIDE apart: (CHUNK, RANK, WIDTH).

    Past the sequence's end it is the last token's, to be met by zeros of x, z and d_out: without a mask no register has
    to be set to zero before it is loaded.
    """
    layout: gl.constexpr = row_layout(WIDTH, RANK)
    token = gl.arange(0, CHUNK, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    rank = gl.arange(0, RANK, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    return gl.load(rows + (gl.minimum(token, left - 1) * RANK + rank) * STRIDE + column)


@gluon.jit
def load_parts(rows, left, STRIDE: gl.constexpr, CHUNK: gl.constexpr, RANK: gl.constexpr, PAIRS: gl.constexpr,
               REST: gl.constexpr):  # fmt: skip
    """A chunk's rows of B or C in three parts."""
    first = load_rows(rows, left, STRIDE, CHUNK, RANK, PAIRS)
    second = load_rows(rows + PAIRS, left, STRIDE, CHUNK, RANK, PAIRS)
    rest = 0.0
    if REST > 0:
        rest = load_rows(rows + 2 * PAIRS, left, STRIDE, CHUNK, RANK, REST)
    return first, second, rest


@gluon.jit
def load_by_token(tokens, STRIDE: gl.constexpr, CHUNK: gl.constexpr, WIDTH: gl.constexpr, layout: gl.constexpr):
    """WIDTH columns of a padded chunk's tokens, STRIDE apart, in a slice of the layout: (CHUNK, WIDTH)."""
    slice: gl.constexpr = gl.SliceLayout(1, layout)
    token = gl.arange(0, CHUNK, gl.SliceLayout(1, slice))[:, None]
    return gl.load(tokens + token * STRIDE + gl.arange(0, WIDTH, gl.SliceLayout(0, slice))[None, :])


@gluon.jit
def copy_tile(source, rows, ROWS: gl.constexpr, STRIDE: gl.constexpr, WIDTH: gl.constexpr):
    """Start copying (ROWS, WIDTH) numbers, STRIDE apart, to where the matrix units read; zeros from row `rows` on."""
    dtype: gl.constexpr = source.dtype.element_ty
    tile = gl.allocate_shared_memory(dtype, [ROWS, WIDTH], operand_layout(ROWS, WIDTH, dtype))
    copy_tile_to(tile, source, rows, ROWS, STRIDE, WIDTH)
    return tile


@gluon.jit
def copy_tile_to(tile, source, rows, ROWS: gl.constexpr, STRIDE: gl.constexpr, WIDTH: gl.constexpr):
    """The same into shared memory that is there already."""
    layout: gl.constexpr = copy_layout(WIDTH, 16)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))[:, None]
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))[None, :]
    if rows is None:
        async_copy.async_copy_global_to_shared(tile, source + row * STRIDE + column)
    else:
        async_copy.async_copy_global_to_shared(tile, source + row * STRIDE + column, mask=row < rows)


@gluon.jit
def copy_weights(source, STRIDE: gl.constexpr, RANK: gl.constexpr, WIDTH: gl.constexpr, FOR_PRODUCT: gl.constexpr):
    """Start copying a head's (RANK, WIDTH) weights, rows STRIDE apart."""
    dtype: gl.constexpr = source.dtype.element_ty
    BITS: gl.constexpr = dtype.primitive_bitwidth
    layout: gl.constexpr = copy_layout(WIDTH, BITS, RANK)
    tile = gl.allocate_shared_memory(dtype, [RANK, WIDTH], weight_layout(BITS, WIDTH, RANK, FOR_PRODUCT))
    rank = gl.arange(0, RANK, gl.SliceLayout(1, layout))[:, None]
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))[None, :]
    async_copy.async_copy_global_to_shared(tile, source + rank * STRIDE + column)
    return tile


@gluon.jit
def copy_bias(bias, head, RANK: gl.constexpr, PAIRS: gl.constexpr, REST: gl.constexpr):
    """Start copying a head's bias of B or C in three parts; 0.0 without a bias."""
    D_STATE: gl.constexpr = 2 * PAIRS + REST
    first = 0.0
    second = 0.0
    rest = 0.0
    if bias is not None:
        at = bias + head * (RANK * D_STATE)
        first = copy_weights(at, D_STATE, RANK, PAIRS, False)
        second = copy_weights(at + PAIRS, D_STATE, RANK, PAIRS, False)
        if REST > 0:
            rest = copy_weights(at + 2 * PAIRS, D_STATE, RANK, REST, False)
    return first, second, rest


@gluon.jit
def keep_place(first, second, rest, BIAS: gl.constexpr, REST: gl.constexpr):
    """Until here, nothing else is put where `copy_bias` put its parts: all threads would have to have read them."""
    if BIAS:
        first._keep_alive()
        second._keep_alive()
        if REST > 0:
            rest._keep_alive()


@gluon.jit
def fetch_chunk_ahead(state, rows, phase, x, z, seqlen, chunks, head_start, HEADS: gl.constexpr,
                      HEADS_HERE: gl.constexpr, STATE_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr,
                      D_STATE: gl.constexpr, PAIRS: gl.constexpr, RANK: gl.constexpr, CHUNK: gl.constexpr,
                      TOKEN_STRIDE: gl.constexpr, AHEAD: gl.constexpr):  # fmt: skip
    """Bring into the L2 cache what the program AHEAD of this one copies: see `kernels/tiles.py`."""
    program = gl.minimum(gl.program_id(0) + AHEAD, gl.num_programs(0) - 1)
    chunk = program // HEADS_HERE
    here = program % HEADS_HERE
    batch = gl.program_id(1).to(gl.int64)
    left = seqlen - chunk * CHUNK
    head = head_start + here
    if state is not None:
        size: gl.constexpr = HEAD_DIM * D_STATE
        fetch_ahead(state + ((batch * (chunks + 1) + chunk) * STATE_HEADS + here) * size, size * 2)
    if rows is not None:
        of_rows: gl.constexpr = CHUNK * RANK * HEAD_DIM
        fetch_ahead(rows + ((batch * HEADS_HERE + here) * chunks + chunk) * of_rows, of_rows * 2)
    fetch_ahead(phase + ((batch * HEADS + head) * chunks + chunk) * (CHUNK * PAIRS), CHUNK * PAIRS * 2)
    token = gl.arange(0, CHUNK, gl.BlockedLayout([1], [32], [4], [0]))
    tokens = (batch * seqlen + chunk * CHUNK + gl.minimum(token, left - 1)) * TOKEN_STRIDE + head * HEAD_DIM
    fetch_line((x + tokens).to(gl.int64))
    if z is not None:
        fetch_line((z + tokens).to(gl.int64))


@gluon.jit
def fetch_line(address):
    """Ask for the memory at these addresses to be in the L2 cache soon."""
    gl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], gl.int32, False, 1)


# Views of products


@gluon.jit
def by_token(product, CHUNK: gl.constexpr, RANK: gl.constexpr, WIDTH: gl.constexpr):
    """A product (rows, WIDTH) as (CHUNK, RANK, WIDTH)."""
    tile = gl.reshape(product, [CHUNK, RANK, WIDTH])
    return gl.convert_layout(tile, accumulator_layout(WIDTH, RANK), assert_trivial=True)


@gluon.jit
def by_row(tile, CHUNK: gl.constexpr, RANK: gl.constexpr, WIDTH: gl.constexpr):
    """The way back from `by_token`."""
    rows = gl.reshape(tile, [CHUNK * RANK, WIDTH])
    return gl.convert_layout(rows, product_layout(WIDTH), assert_trivial=True)


@gluon.jit
def mixed(rows, WIDTH: gl.constexpr):
    """(64, WIDTH) with columns 2i + 8j + e and 8i + 2j + e of every 32 exchanged (i, j < 4; e < 2).

    A product leaves each thread columns 2i + 8j + e of one i, whatever the order of its right operand's columns means.
    In this one they stand for neighbours, which go to memory in 16 bytes.
    """
    if WIDTH < 32:
        return rows
    else:
        tile = gl.permute(gl.reshape(rows, [64, WIDTH // 32, 4, 4, 2]), (0, 1, 3, 2, 4))
        return gl.reshape(tile, [64, WIDTH])


@gluon.jit
def neighbours(product, WIDTH: gl.constexpr):
    """A product's columns `mixed`: no number leaves its thread."""
    return gl.convert_layout(mixed(product, WIDTH), neighbour_layout(WIDTH), assert_trivial=True)


@gluon.jit
def store_neighbours(target, tile, STRIDE: gl.constexpr, WIDTH: gl.constexpr):
    """`neighbours` to memory, rounded to what is there, rows STRIDE apart."""
    row = gl.arange(0, 64, gl.SliceLayout(1, neighbour_layout(WIDTH)))[:, None]
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, neighbour_layout(WIDTH)))[None, :]
    gl.store(target + row * STRIDE + column, tile.to(target.dtype.element_ty))


@gluon.jit
def load_neighbours(source, STRIDE: gl.constexpr, WIDTH: gl.constexpr):
    """What `store_neighbours` left in memory."""
    row = gl.arange(0, 64, gl.SliceLayout(1, neighbour_layout(WIDTH)))[:, None]
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, neighbour_layout(WIDTH)))[None, :]
    return gl.load(source + row * STRIDE + column)


@gluon.jit
def of_neighbours(tile, WIDTH: gl.constexpr):
    """The way back from `neighbours`."""
    return gl.convert_layout(mixed(tile, WIDTH), product_layout(WIDTH), assert_trivial=True)


# In registers


@gluon.jit
def widened(tile):
    """A tile in float32.

    From bfloat16 by two numbers at a time, an instruction each: one by one, the second takes two.
    """
    if tile.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [tile], gl.float32, True, 2
        )
    else:
        return tile.to(gl.float32)


# From and to shared memory


@gluon.jit
def read_by_token(tile, layout: gl.constexpr):
    """(CHUNK, width) of shared memory as (CHUNK, 1, width), in a slice of the layout."""
    return tile.load(gl.SliceLayout(1, layout))[:, None, :]


@gluon.jit
def read_by_rank(tile, layout: gl.constexpr):
    """(RANK, width) of shared memory as (1, RANK, width) in float32."""
    return widened(tile.load(gl.SliceLayout(0, layout)))[None, :, :]


@gluon.jit
def share(rows, CHUNK: gl.constexpr, RANK: gl.constexpr, WIDTH: gl.constexpr):
    """(CHUNK, RANK, WIDTH) to where the matrix units read, as (CHUNK · RANK, WIDTH)."""
    ROWS: gl.constexpr = CHUNK * RANK
    tile = gl.reshape(rows, [ROWS, WIDTH])
    return gl.allocate_shared_memory(rows.dtype, [ROWS, WIDTH], operand_layout(ROWS, WIDTH, rows.dtype), tile)


@gluon.jit
def put(tile, rows, CHUNK: gl.constexpr, RANK: gl.constexpr, WIDTH: gl.constexpr):
    """The same to shared memory that is there already."""
    tile.store(gl.reshape(rows, [CHUNK * RANK, WIDTH]))


@gluon.jit
def store_rows(target, tile, rows, STRIDE: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """The first `rows` rows of a tile of shared memory, (ROWS, WIDTH), to memory, STRIDE apart."""
    layout: gl.constexpr = copy_layout(WIDTH, 16)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))[:, None]
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))[None, :]
    gl.store(target + row * STRIDE + column, tile.load(layout), mask=row < rows)


@gluon.jit
def store_by_token(target, tile, left, STRIDE: gl.constexpr, CHUNK: gl.constexpr, WIDTH: gl.constexpr):
    """(CHUNK, WIDTH), a slice of a product, to the first `left` tokens of memory, STRIDE apart."""
    token = gl.arange(0, CHUNK, gl.SliceLayout(1, tile.type.layout))[:, None]
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, tile.type.layout))[None, :]
    gl.store(target + token * STRIDE + column, tile.to(target.dtype.element_ty), mask=token < left)


@gluon.jit
def store_tokens(target, tile, scratch, left, STRIDE: gl.constexpr, CHUNK: gl.constexpr, RANK: gl.constexpr,
                 WIDTH: gl.constexpr):  # fmt: skip
    """(CHUNK, RANK, WIDTH), summed over ranks, to the first `left` tokens of memory, by way of (64, WIDTH) scratch."""
    if RANK > 1:
        store_sums_of_ranks(target, tile, left, STRIDE, CHUNK, RANK, WIDTH)
    else:
        scratch.store(by_row(tile, CHUNK, RANK, WIDTH).to(scratch.dtype))
        store_rows(target, scratch, left, STRIDE, CHUNK, WIDTH)


@gluon.jit
def store_sums_of_ranks(target, tile, left, STRIDE: gl.constexpr, CHUNK: gl.constexpr, RANK: gl.constexpr,
                        WIDTH: gl.constexpr):  # fmt: skip
    """`store_tokens` of 2, 4 or 8 ranks: each thread ends with its share of the columns instead of all of them."""
    tile = fold_ranks(tile, 1, WIDTH // 2, CHUNK, RANK, WIDTH)
    if RANK > 2:
        tile = fold_ranks(tile, 2, WIDTH // 4, CHUNK, RANK, WIDTH // 2)
    if RANK > 4:
        tile = fold_ranks(tile, 4, WIDTH // 8, CHUNK, RANK, WIDTH // 4)
    layout: gl.constexpr = tile.type.layout
    token = gl.arange(0, CHUNK, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    rank = gl.arange(0, RANK, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    column = gl.arange(0, WIDTH // RANK, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    column += (rank & 1) * (WIDTH // 2) + (rank & 2) * (WIDTH // 8) + (rank & 4) * (WIDTH // 32)
    gl.store(target + token * STRIDE + column, tile.to(target.dtype.element_ty), mask=token < left)


@gluon.jit
def fold_ranks(tile, BIT: gl.constexpr, COLUMN: gl.constexpr, CHUNK: gl.constexpr, RANK: gl.constexpr,
               WIDTH: gl.constexpr):  # fmt: skip
    """Sum (CHUNK, RANK, WIDTH) over pairs of ranks that differ in BIT: columns without COLUMN, a power of two that a
    thread holds with and without, stay with the one rank, those with it go to the other, (CHUNK, RANK, WIDTH / 2).

    A whole sum of four ranks passes two numbers a number between threads, this three quarters of one.
    """
    halves = gl.permute(gl.reshape(tile, [CHUNK, RANK, WIDTH // (2 * COLUMN), 2, COLUMN]), (0, 1, 2, 4, 3))
    first, second = gl.split(halves)
    first = gl.reshape(first, [CHUNK, RANK, WIDTH // 2])
    second = gl.reshape(second, [CHUNK, RANK, WIDTH // 2])
    rank = gl.arange(0, RANK, gl.SliceLayout(0, gl.SliceLayout(2, first.type.layout)))[None, :, None]
    return gl.inline_asm_elementwise(exchange(BIT), "=f,f,f,r", [first, second, rank & BIT], gl.float32, False, 1)


@gluon.jit
def neighbour_shares(tile, CHUNK: gl.constexpr, RANK: gl.constexpr, WIDTH: gl.constexpr):
    """Sums over ranks of (CHUNK, RANK, WIDTH) in a `neighbour_layout`: (CHUNK, RANK, WIDTH / RANK) in `share_layout`.

    Of eight neighbours rank r has 4 (r & 1) + 2 (r / 2 & 1) + (r / 4 & 1) and, below rank 8, those behind it.
    """
    tile = fold_ranks(tile, 1, 4, CHUNK, RANK, WIDTH)
    if RANK > 2:
        tile = fold_ranks(tile, 2, 2, CHUNK, RANK, WIDTH // 2)
    if RANK > 4:
        tile = fold_ranks(tile, 4, 1, CHUNK, RANK, WIDTH // 4)
    return gl.convert_layout(tile, share_layout(WIDTH, RANK), assert_trivial=True)


@gluon.jit
def in_shares(CHUNK: gl.constexpr, RANK: gl.constexpr, WIDTH: gl.constexpr):
    """Where the numbers of `neighbour_shares` belong in (CHUNK, WIDTH)."""
    layout: gl.constexpr = share_layout(WIDTH, RANK)
    token = gl.arange(0, CHUNK, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    rank = gl.arange(0, RANK, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    column = gl.arange(0, WIDTH // RANK, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    left: gl.constexpr = 8 // RANK
    column = column // left * 8 + column % left + rank % 2 * 4 + rank // 2 % 2 * 2
    if RANK > 4:
        column += rank // 4
    return token * WIDTH + column


@gluon.constexpr_function
def exchange(bit):
    """Assembler: the first number of this thread and of the one whose rank differs in a bit, or their second."""
    return (
        "{ .reg .pred second; .reg .b32 sent, kept; setp.ne.b32 second, $3, 0; selp.b32 sent, $1, $2, second; "
        "selp.b32 kept, $2, $1, second; "
        f"shfl.sync.bfly.b32 sent, sent, {4 * bit}, 31, -1; add.f32 $0, kept, sent; }}"
    )


@gluon.jit
def store_ranks(target, product, RANK: gl.constexpr, WIDTH: gl.constexpr):
    """The first RANK rows of `sum_of_tokens` to contiguous memory."""
    layout: gl.constexpr = product_layout(WIDTH)
    rank = gl.arange(0, 64, gl.SliceLayout(1, layout))[:, None]
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))[None, :]
    gl.store(target + rank * WIDTH + column, product, mask=rank < RANK)
