"""What is done on the diagonal of a product of the Hopper kernels, (64, 64), alone."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mamba3_train.kernels.hopper.layouts import product_layout


@gluon.jit
def quarters(tile):
    """(64, 64) by the bits of 8 in its rows and columns, [row bit][column bit]: four tiles (32, 32).

    The diagonal, and all blocks of eight along it, are in the first and the last. A product's threads hold numbers of
    all quarters, so that what is done on the diagonal alone is done to half of them.
    """
    tile = gl.permute(gl.reshape(tile, [4, 2, 8, 4, 2, 8]), (0, 2, 3, 5, 4, 1))
    upper, lower = gl.split(tile)
    upper_left, upper_right = gl.split(upper)
    lower_left, lower_right = gl.split(lower)
    return (
        gl.reshape(upper_left, [32, 32]), gl.reshape(upper_right, [32, 32]),
        gl.reshape(lower_left, [32, 32]), gl.reshape(lower_right, [32, 32]),
    )  # fmt: skip


@gluon.jit
def near_diagonal(tile, BLOCK: gl.constexpr):
    """Whether numbers of a quarter on the diagonal lie in its blocks of BLOCK rows and columns."""
    row = gl.arange(0, 32, gl.SliceLayout(1, tile.type.layout))[:, None]
    column = gl.arange(0, 32, gl.SliceLayout(0, tile.type.layout))[None, :]
    return row // BLOCK == column // BLOCK


@gluon.jit
def add_to_diagonal(tile, number):
    """A product (64, 64) plus a number on the diagonal."""
    upper_left, upper_right, lower_left, lower_right = quarters(tile)
    added = gl.where(near_diagonal(upper_left, 1), number, 0.0)
    upper = gl.join(upper_left + added, upper_right)
    lower = gl.join(lower_left, lower_right + added)
    tile = gl.reshape(gl.join(upper, lower), [4, 8, 4, 8, 2, 2])
    tile = gl.reshape(gl.permute(tile, (0, 5, 1, 2, 4, 3)), [64, 64])
    return gl.convert_layout(tile, product_layout(64), assert_trivial=True)


@gluon.jit
def sums_on_diagonal(one, other, CHUNK: gl.constexpr, RANK: gl.constexpr):
    """Each token's sum of two products' (64, 64) product over its own queries and keys, (CHUNK,)."""
    one = quarters(one)
    other = quarters(other)
    own = near_diagonal(one[0], RANK)
    upper = gl.sum(gl.where(own, one[0], 0.0) * other[0], axis=1)
    lower = gl.sum(gl.where(own, one[3], 0.0) * other[3], axis=1)
    rows = gl.permute(gl.reshape(gl.join(upper, lower), [4, 8, 2]), (0, 2, 1))
    return gl.sum(gl.reshape(rows, [CHUNK, RANK]), axis=1)


@gluon.jit
def trace(tile):
    """Sum of a product's (64, 64) diagonal, each warp's part of it by itself, (4,)."""
    upper, _, _, lower = quarters(tile)
    on_diagonal = gl.where(near_diagonal(upper, 1), upper + lower, 0.0)
    return gl.sum(gl.reshape(on_diagonal, [4, 8 * 32]), axis=1)
