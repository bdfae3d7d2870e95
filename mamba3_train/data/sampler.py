"""The order of training: a pure function (seed, epoch, index) -> sample, and the part of each step that a rank reads.

The only state is one global cursor, the number of samples consumed. Nothing is drawn from a generator and nothing is
listed, so that any point of any epoch is reached in constant time and memory, for a corpus of any size.
"""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

ROUNDS = 6


# Arrays, because numpy takes twice as long over its own scalars in the short arrays of a batch.
_HALF_WORD, _ODD = np.array(32, dtype=np.uint64), np.array(0xD6E8FEB86659FD93, dtype=np.uint64)


def _mix(x: np.ndarray) -> np.ndarray:
    """Scramble 64-bit integers so that every output bit depends on every input bit (xor-shift-multiply, twice)."""
    x = x ^ (x >> _HALF_WORD)
    x *= _ODD
    x ^= x >> _HALF_WORD
    x *= _ODD
    x ^= x >> _HALF_WORD
    return x


def permute(index: np.ndarray, size: int, seed: int, epoch: int, stream: int = 0) -> np.ndarray:
    """Map each index in [0, size) to a sample in [0, size), one to one, in an order that looks random.

    A Feistel network permutes the smallest square power of two that holds `size`; results outside are sent through it
    again until they fall inside ("cycle walking"), fewer than four times on average.

    Args:
        index: integers in [0, size), any shape.
        size: number of samples, up to 2**62.
        seed: the run's seed; `epoch`: the pass over the data; `stream`: which of several sets of samples. Each triple
            gives another order.
    """
    half_bits = max(2, ((size - 1).bit_length() + 1) // 2)
    half, mask = np.array(half_bits, dtype=np.uint64), np.array((1 << half_bits) - 1, dtype=np.uint64)
    keys = np.random.SeedSequence([seed, epoch, stream]).generate_state(ROUNDS, np.uint64)[:, None]

    def network(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for key in keys:
            mixed = _mix(right ^ key)
            mixed &= mask
            left, right = right, left ^ mixed
        return (left << half) | right

    index = np.asarray(index, dtype=np.uint64)
    result = network(index.ravel())
    outside = np.flatnonzero(result >= size)
    while len(outside):
        result[outside] = network(result[outside])
        outside = outside[result[outside] >= size]
    return result.astype(np.int64).reshape(index.shape)


def samples_at(positions: np.ndarray, size: int, seed: int, stream: int = 0) -> np.ndarray:
    """Samples at positions of the endless training order, which shuffles each epoch of `size` samples anew."""
    positions = np.asarray(positions, dtype=np.int64)
    epochs, indices = np.divmod(positions, size)
    samples = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        samples[here] = permute(indices[here], size, seed, int(epoch), stream)
    return samples


class StepSampler(Sampler[range]):
    """For each optimizer step, the positions of the global order that this rank reads.

    Global step k takes positions [k·G, (k+1)·G) counted from the cursor; rank r of W takes the r-th of W equal parts.
    The union over ranks, and its order, therefore do not depend on W.

    Args:
        samples_consumed: the cursor: samples consumed by all ranks before the first step.
        steps: steps to yield.
        length: what `len()` says: the steps of the whole run, those already taken included, as Lightning counts.
        global_batch_size: samples a step, over all ranks. `rank`, `world_size`: this process and how many there are.
    """

    def __init__(
        self, *, samples_consumed: int, steps: int, length: int, global_batch_size: int, rank: int, world_size: int
    ):
        self.samples_consumed = samples_consumed
        self.steps = steps
        self.length = length
        self.global_batch_size = global_batch_size
        self.share = global_batch_size // world_size
        self.offset = rank * self.share
        self._finished = False

    def __iter__(self) -> Iterator[range]:
        if self._finished:
            raise RuntimeError(
                f"all {self.length} steps of the run are read and another pass began, which would repeat data: "
                "total_steps is not the Trainer's max_steps, or the Trainer's own progress was not restored"
            )
        for step in range(self.steps):
            start = self.samples_consumed + step * self.global_batch_size + self.offset
            yield range(start, start + self.share)
        self._finished = True

    def __len__(self) -> int:
        return self.length
