"""The order: a permutation, the same whatever reads it."""

import numpy as np
import pytest

from mamba3_train.data.sampler import StepSampler, permute, samples_at


@pytest.mark.parametrize("size", [1, 2, 3, 15, 16, 17, 255, 1000, 65_537])
@pytest.mark.parametrize("epoch", [0, 3])
def test_every_sample_comes_once_an_epoch(size, epoch):
    order = permute(np.arange(size), size, seed=7, epoch=epoch)
    assert np.array_equal(np.sort(order), np.arange(size))


def test_order_is_fixed_for_ever():
    """A run resumed with a later version must go on with the same data: these numbers may never change."""
    assert permute(np.arange(8), 100, seed=1, epoch=0).tolist() == [42, 56, 92, 25, 76, 12, 36, 31]


def test_seeds_and_epochs_give_other_orders():
    orders = [permute(np.arange(1000), 1000, seed, epoch) for seed in range(3) for epoch in range(3)]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            assert (first == second).sum() < 20


def test_order_looks_random():
    """Mean distance of neighbours, correlation with the index and bit balance are those of a random order."""
    size = 100_000
    order = permute(np.arange(size), size, seed=3, epoch=0).astype(float)
    assert abs(np.abs(np.diff(order)).mean() / size - 1 / 3) < 0.005
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.02
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.02
    halves = np.histogram(order[: size // 10], bins=20)[0]
    assert abs(halves - size / 200).max() < 5 * np.sqrt(size / 200)


def test_a_trillion_samples_by_arithmetic():
    size = 10**12 + 39
    index = np.random.default_rng(0).integers(0, size, 20_000)
    samples = permute(index, size, seed=0, epoch=5)
    assert samples.min() >= 0
    assert samples.max() < size
    assert len(np.unique(samples)) == len(np.unique(index))
    assert np.array_equal(samples[:10], permute(index[:10], size, seed=0, epoch=5))


def test_positions_run_through_epochs():
    positions = np.arange(95, 205)
    samples = samples_at(positions, 100, seed=2)
    assert np.array_equal(samples[5:105], permute(np.arange(100), 100, seed=2, epoch=1))
    assert np.array_equal(samples[105:], permute(np.arange(5), 100, seed=2, epoch=2))


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_together_read_the_global_order(world_size):
    samplers = [
        StepSampler(samples_consumed=48, steps=5, length=8, global_batch_size=16, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert all(len(sampler) == 8 for sampler in samplers)
    order = [position for step in zip(*samplers, strict=True) for part in step for position in part]
    assert order == list(range(48, 48 + 5 * 16))
