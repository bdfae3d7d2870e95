"""A head's whole state in three parts, between memory, shared memory and registers, as walks along chunks hold it."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mamba3_train.kernels.hopper.layouts import neighbour_layout, operand_layout, product_layout
from mamba3_train.kernels.hopper.memory import copy_tile_to, mixed, neighbours, store_neighbours, widened


@gluon.jit
def load_state(state, PAIRS: gl.constexpr, REST: gl.constexpr):
    """A float32 state (P, N) in three parts, as products."""
    D_STATE: gl.constexpr = 2 * PAIRS + REST
    s0 = gl.load(state + in_state(PAIRS, D_STATE))
    s1 = gl.load(state + PAIRS + in_state(PAIRS, D_STATE))
    s2 = 0.0
    if REST > 0:
        s2 = gl.load(state + 2 * PAIRS + in_state(REST, D_STATE))
    return s0, s1, s2


@gluon.jit
def store_state(state, s0, s1, s2, PAIRS: gl.constexpr, REST: gl.constexpr):
    """The way back from `load_state`."""
    D_STATE: gl.constexpr = 2 * PAIRS + REST
    gl.store(state + in_state(PAIRS, D_STATE), s0)
    gl.store(state + PAIRS + in_state(PAIRS, D_STATE), s1)
    if REST > 0:
        gl.store(state + 2 * PAIRS + in_state(REST, D_STATE), s2)


@gluon.jit
def in_state(WIDTH: gl.constexpr, D_STATE: gl.constexpr):
    """Where the numbers of a product (64, WIDTH) lie in a state."""
    row = gl.arange(0, 64, gl.SliceLayout(1, product_layout(WIDTH)))[:, None]
    return row * D_STATE + gl.arange(0, WIDTH, gl.SliceLayout(0, product_layout(WIDTH)))[None, :]


@gluon.jit
def zero_state(HEAD_DIM: gl.constexpr, PAIRS: gl.constexpr, REST: gl.constexpr):
    """A state of zeros in three parts, as products."""
    s0 = gl.zeros([HEAD_DIM, PAIRS], gl.float32, product_layout(PAIRS))
    s1 = gl.zeros([HEAD_DIM, PAIRS], gl.float32, product_layout(PAIRS))
    s2 = 0.0
    if REST > 0:
        s2 = gl.zeros([HEAD_DIM, REST], gl.float32, product_layout(REST))
    return s0, s1, s2


@gluon.jit
def state_tiles(dtype: gl.constexpr, HEAD_DIM: gl.constexpr, PAIRS: gl.constexpr, REST: gl.constexpr):
    """Shared memory for a state in three parts."""
    t0 = gl.allocate_shared_memory(dtype, [HEAD_DIM, PAIRS], operand_layout(HEAD_DIM, PAIRS, dtype))
    t1 = gl.allocate_shared_memory(dtype, [HEAD_DIM, PAIRS], operand_layout(HEAD_DIM, PAIRS, dtype))
    t2 = 0.0
    if REST > 0:
        t2 = gl.allocate_shared_memory(dtype, [HEAD_DIM, REST], operand_layout(HEAD_DIM, REST, dtype))
    return t0, t1, t2


@gluon.jit
def store_mixed(state, s0, s1, s2, PAIRS: gl.constexpr, REST: gl.constexpr):
    """A state (P, N) to memory, rounded to what is there, each part's columns `mixed`.

    One part lies behind the other, so that whole lines of 128 bytes are stored and copied.
    """
    store_neighbours(state, neighbours(s0, PAIRS), PAIRS, PAIRS)
    store_neighbours(state + 64 * PAIRS, neighbours(s1, PAIRS), PAIRS, PAIRS)
    if REST > 0:
        store_neighbours(state + 128 * PAIRS, neighbours(s2, REST), REST, REST)


@gluon.jit
def read_mixed(tile, WIDTH: gl.constexpr):
    """A part of such a state in shared memory as a product, in float32."""
    rows = mixed(tile.load(neighbour_layout(WIDTH)), WIDTH)
    return widened(gl.convert_layout(rows, product_layout(WIDTH), assert_trivial=True))


@gluon.jit
def copy_state(state, HEAD_DIM: gl.constexpr, PAIRS: gl.constexpr, REST: gl.constexpr):
    """Start copying a state that was stored so to where the matrix units read."""
    t0, t1, t2 = state_tiles(state.dtype.element_ty, HEAD_DIM, PAIRS, REST)
    copy_state_to(t0, t1, t2, state, HEAD_DIM, PAIRS, REST)
    return t0, t1, t2


@gluon.jit
def copy_state_to(t0, t1, t2, state, HEAD_DIM: gl.constexpr, PAIRS: gl.constexpr, REST: gl.constexpr):
    """The same into shared memory that is there already."""
    copy_tile_to(t0, state, None, HEAD_DIM, PAIRS, PAIRS)
    copy_tile_to(t1, state + HEAD_DIM * PAIRS, None, HEAD_DIM, PAIRS, PAIRS)
    if REST > 0:
        copy_tile_to(t2, state + 2 * HEAD_DIM * PAIRS, None, HEAD_DIM, REST, REST)
