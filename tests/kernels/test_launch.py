"""Launches that a GPU cannot make are refused in words."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from mamba3_train.kernels import launch


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
