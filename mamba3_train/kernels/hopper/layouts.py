"""Layouts of the Hopper kernels: which thread holds what, so that tiles meet without moving between threads.

A tile of a chunk's rows is (CHUNK, RANK, width): in a `row_layout` where it is loaded (16 bytes a thread) and rotated,
in an `accumulator_layout` where a product left it. What tokens or ranks share is read in slices of these.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

WARPS = 4


@gluon.constexpr_function
def row_layout(width, rank):
    """For (CHUNK, RANK, width) of 16-bit numbers: eight neighbours a thread, the ranks of a token in one warp."""
    columns = min(width // 8, 32)
    ranks = min(rank, 32 // columns)
    return gl.BlockedLayout([1, 1, 8], [32 // columns // ranks, ranks, columns], [WARPS, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def copy_layout(width, bits, rows=64):
    """For (rows, width): 16 bytes a thread; less, but at least 4, where every thread gets some by that.

    What only some threads do, the assembler puts behind a branch, and the loads before it as well.
    """
    numbers, each = 128 // bits, rows * width // 128
    if 32 // bits <= each < numbers:
        numbers = each
    columns = min(width // numbers, 32)
    return gl.BlockedLayout([1, numbers], [32 // columns, columns], [WARPS, 1], [1, 0])


@gluon.constexpr_function
def product_layout(width):
    """For (64, width), a product of the matrix units."""
    return gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, width, 16])


@gluon.constexpr_function
def left_layout(width):
    """For (64, K), the left operand in registers of a product (64, width)."""
    return gl.DotOperandLayout(0, product_layout(width), 2)


@gluon.constexpr_function
def accumulator_layout(width, rank):
    """`product_layout` seen as (CHUNK, RANK, width)."""

    def row(bit):
        return [bit // rank, 0, 0] if bit >= rank else [0, bit, 0]

    columns = [[0, 0, 8 << i] for i in range((width // 8).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [[0, 0, 1], row(8), *columns],
        [[0, 0, 2], [0, 0, 4], row(1), row(2), row(4)],
        [row(16), row(32)],
        [],
        [64 // rank, rank, width],
    )


@gluon.constexpr_function
def neighbour_layout(width, rank=None):
    """For (64, width), or (CHUNK, RANK, width), a product with columns as `memory.mixed` orders them.

    Eight neighbours a thread, 16 bytes at 16 bit; below 32 columns two, as in a product.
    """
    shape = [64, width] if rank is None else [64 // rank, rank, width]

    def row(bit):
        if rank is None:
            return [bit, 0]
        return [bit // rank, 0, 0] if bit >= rank else [0, bit, 0]

    def column(bit):
        return [0] * (len(shape) - 1) + [bit]

    in_thread, between = ((2, 4), 8) if width >= 32 else ((), 2)
    others = [bit for bit in (8, 16, 32, 64) if bit < width and bit not in (between, 2 * between)]
    return gl.DistributedLinearLayout(
        [column(1), *map(column, in_thread), row(8), *map(column, others)],
        [column(between), column(2 * between), row(1), row(2), row(4)],
        [row(16), row(32)],
        [],
        shape,
    )


@gluon.constexpr_function
def share_layout(width, rank):
    """For (CHUNK, RANK, width / RANK): `neighbour_layout` after ranks have shared each eight neighbours among them."""

    def row(bit):
        return [bit // rank, 0, 0] if bit >= rank else [0, bit, 0]

    def columns(first, behind):
        return [[0, 0, first << i] for i in range((behind // first).bit_length() - 1)]

    left = 8 // rank
    return gl.DistributedLinearLayout(
        [*columns(1, left), row(8), *columns(4 * left, width // rank)],
        [[0, 0, left], [0, 0, 2 * left], row(1), row(2), row(4)],
        [row(16), row(32)],
        [],
        [64 // rank, rank, width // rank],
    )


@gluon.constexpr_function
def pair_layout(rank):
    """`product_layout(64)` of two chunks' rows seen as (CHUNK, RANK, CHUNK, RANK)."""

    def row(bit):
        return [bit // rank, 0, 0, 0] if bit >= rank else [0, bit, 0, 0]

    def column(bit):
        return [0, 0, bit // rank, 0] if bit >= rank else [0, 0, 0, bit]

    return gl.DistributedLinearLayout(
        [column(1), row(8), column(8), column(16), column(32)],
        [column(2), column(4), row(1), row(2), row(4)],
        [row(16), row(32)],
        [],
        [64 // rank, rank, 64 // rank, rank],
    )


@gluon.constexpr_function
def operand_layout(rows, width, dtype):
    """In shared memory, for what the matrix units read."""
    return gl.NVMMASharedLayout.get_default_for([rows, width], dtype)


@gluon.constexpr_function
def weight_layout(bits, width, rank, for_product):
    """In shared memory, for a head's (RANK, width) weights, read by eight or two a thread: ranks in other banks."""
    if bits == 32 and width == 64 and not for_product:
        # Eight threads read a rank's 16 bytes at a distance of 32: those lie side by side.
        ranks = [[1, 8], [2, 16], [4, 32]][: rank.bit_length() - 1]
        return gl.SharedLinearLayout([[0, 1], [0, 2], [0, 8], [0, 16], [0, 32], [0, 4], *ranks])
    vector = (8 if for_product else 4) * 32 // bits
    return gl.SwizzledSharedLayout(vector, 1, min(rank, 4), [1, 0])
