"""The interpreter of Gluon kernels computes what they say, and refuses what a GPU would do wrong in silence."""

import pytest
import torch
from gluon_interpreter import jit
from gluon_interpreter import language as gl
from gluon_interpreter import products as hopper


@jit
def square_kernel(source, target, rows, STEPS):
    """target = (source @ source)ᵀ + source of the first rows, by the steps given; a step left out is a fault."""
    at = gl.arange(0, 4, None)[:, None] * 4 + gl.arange(0, 4, None)[None, :]
    tile = gl.allocate_shared_memory(gl.float32, [4, 4], None)
    inside = None if "mask" not in STEPS else gl.arange(0, 4, None)[:, None] < rows
    hopper.async_copy.async_copy_global_to_shared(tile, source + at, mask=inside)
    hopper.async_copy.commit_group()
    if "wait for the copy" in STEPS:
        hopper.async_copy.wait_group(0)
    added = tile.load(None)
    if "fence" in STEPS:
        hopper.fence_async_shared()
    product = hopper.warpgroup_mma(tile.permute((1, 0)), tile.permute((1, 0)), added, is_async=True)
    if "no store before" not in STEPS:
        tile.store(added)
    if "no memory before" not in STEPS:
        gl.allocate_shared_memory(gl.float32, [4, 4], None, added)
    if "wait" in STEPS:
        product = hopper.warpgroup_mma_wait(0, [product])
    if "keep" in STEPS:
        tile.store(product)
    gl.store(target + at, product)


STEPS = ("mask", "wait for the copy", "fence", "no store before", "no memory before", "wait", "keep")
FAULTS = {
    "mask": "0 to 15 of 12 numbers",
    "wait for the copy": "read before its copy was waited for",
    "fence": "written since the last fence",
    "no store before": "written over while a product may still read it",
    "wait": "used before it was waited for",
}


def test_a_kernel_without_fault():
    source = torch.randn(3, 4)
    target = torch.empty(4, 4)
    square_kernel[(2,)](source, target, 3, STEPS=STEPS, num_warps=4)
    whole = torch.cat([source, torch.zeros(1, 4)])
    assert torch.allclose(target, (whole @ whole).T + whole, atol=1e-6)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_left_out(fault):
    steps = tuple(step for step in STEPS if step != fault)
    with pytest.raises(AssertionError, match=FAULTS[fault]):
        square_kernel[(1,)](torch.randn(3, 4), torch.empty(4, 4), 3, STEPS=steps)


def test_memory_is_allocated_while_a_product_reads_what_has_no_name_left():
    """With its name used later, the tile keeps its place, and the other allocation is harmless."""
    steps = tuple(step for step in STEPS if step != "no memory before")
    square_kernel[(1,)](torch.randn(3, 4), torch.empty(4, 4), 3, STEPS=steps)
    with pytest.raises(AssertionError, match="last named before the product"):
        square_kernel[(1,)](torch.randn(3, 4), torch.empty(4, 4), 3, STEPS=tuple(s for s in steps if s != "keep"))


@jit
def passed_kernel(target, NAME):
    tile = gl.allocate_shared_memory(gl.float32, [4, 4], None, gl.zeros([4, 4], gl.float32, None))
    hopper.fence_async_shared()
    product = hopper.warpgroup_mma(tile, tile, gl.zeros([4, 4], gl.float32, None), use_acc=False, is_async=True)
    product, passed = hopper.warpgroup_mma_wait(0, [product, tile])
    (tile if NAME == "its own" else passed).store(product)
    gl.store(target, 1.0 * gl.program_id(0))


def test_a_tile_keeps_its_own_name():
    passed_kernel[(1,)](torch.empty(1), NAME="its own")
    with pytest.raises(AssertionError, match="by the name that a wait"):
        passed_kernel[(1,)](torch.empty(1), NAME="that of the wait")
