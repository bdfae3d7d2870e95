"""Launches that a GPU cannot make are refused in words; those like an earlier one, and no others, are not looked up."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from mamba3_train.kernels import launch, launch_table, sizes
from mamba3_train.kernels.inputs import Inputs


class TooLarge:
    """A kernel that does not fit."""

    fn = SimpleNamespace(__name__="chunk_keys_backward_kernel")
    arg_names = ()

    def __getitem__(self, grid):
        def start(*args, **options):
            raise OutOfResources(131072, 101376, "shared memory")

        return start


def test_a_kernel_that_does_not_fit_the_gpu_is_refused_with_what_to_do(monkeypatch):
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    message = "chunk_keys_backward_kernel needs 131,072 of shared memory .* has 101,376: use a smaller chunk_size"
    with pytest.raises(RuntimeError, match=message):
        launch.run(TooLarge(), (1,))


@pytest.mark.parametrize("rank", [1, 4])
def test_small_shared_memory_takes_smaller_tiles_of_the_largest_sizes_only(rank):
    def rows(head_dim, d_state, shared_kib):
        return rank * launch.choose(rank, head_dim, d_state, torch.float16, shared_kib=shared_kib).chunk

    assert (rows(128, 256, 227), rows(128, 256, 99)) == (32, 16)
    assert rows(64, 128, 227) == rows(64, 128, 99) == 64


class Recorded:
    """A kernel that notes how it was launched."""

    arg_names = ("a", "b", "count", "WIDTH")

    def __init__(self, fn):
        self.fn, self.looked_up, self.started = fn, [], []

    def __getitem__(self, grid):
        def start(*args, **options):
            self.looked_up.append((args, options))
            return self.Compiled(self.started)

        return start

    class Compiled:
        def __init__(self, started):
            self.started = started

        def __getitem__(self, grid):
            return lambda *values: self.started.append((grid, values))


def test_a_launcher_looks_a_kernel_up_once_for_each_kind_of_arguments(monkeypatch):
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(launch, "_refuse_wrong_code", lambda *_: None)
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    kernel, other = Recorded(max), Recorded(min)
    start = launch.Launcher((5, 2), {"num_warps": 4, "WIDTH": 16})
    a, b, c = torch.empty(3, 32).unbind()
    for arguments in ((a, b, 1), (b, c, 2), (a, None, 3), (c, None, 4)):
        start(kernel, *arguments)
    start(other, a, b, 5)
    assert [args[2] for args, _ in kernel.looked_up] == [1, 3]
    assert all(options == {"num_warps": 4, "WIDTH": 16} for _, options in kernel.looked_up)
    grid = (5, 2, 1)
    assert kernel.started == [(grid, (b.data_ptr(), c.data_ptr(), 2, 16)), (grid, (c.data_ptr(), None, 4, 16))]
    assert (len(other.looked_up), other.started) == (1, [])


def test_what_follows_from_sizes_is_kept_for_equal_calls_only(monkeypatch):
    def known(seqlen=20, dt=torch.float32):
        x, B = torch.empty(1, seqlen, 2, 16), torch.empty(1, seqlen, 1, 1, 16)
        inputs = Inputs(x, B, B, x[..., 0].to(dt), x[..., 0], *[None] * 12)
        return sizes.Sizes.known(inputs)

    monkeypatch.setattr(sizes, "interpreted", lambda: True)
    monkeypatch.setattr(sizes, "runs_on_hopper", lambda *_: False)
    first = known()
    assert known() is first
    assert first.passing is first.passing
    assert known(seqlen=40).chunks > first.chunks
    assert known(dt=torch.float64) is not first
    find = launch_table.find
    monkeypatch.setattr(launch_table, "find", lambda gear, size: find(gear, size) | {"rows": 16})
    assert (first.launch.chunk, known().launch.chunk) == (32, 16)
    monkeypatch.setattr(sizes, "interpreted", lambda: False)
    monkeypatch.setattr(sizes, "programs_ahead", lambda device: 7)
    assert [start.options["AHEAD"] for start in known().on_chunks.values()] == [7] * 5
    assert first.on_chunks["keys"].options["AHEAD"] == 0
