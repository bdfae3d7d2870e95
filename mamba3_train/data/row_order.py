"""The order of a source's rows: the whole corpus shuffled together, or a few of its shards at a time."""

import numpy as np

from mamba3_train.data.sampler import permute, samples_at


class RowOrder:
    """Each epoch shuffles all rows; see `sampler.samples_at`."""

    def __init__(self, count: int, seed: int, stream: int = 0):
        self.count, self.seed, self.stream = count, seed, stream

    def rows_at(self, positions: np.ndarray) -> np.ndarray:
        """Rows at positions of the endless order."""
        return samples_at(positions, self.count, self.seed, self.stream)


class ShardOrder:
    """Each epoch shuffles the shards, takes them `shards_at_once` by `shards_at_once`, and shuffles the rows of these.

    For a corpus that does not fit the disk it is read from. It too is a pure function of the position, in constant
    time; it holds a few integers a shard.

    Args:
        row_starts: (shards + 1,) the first row of each shard, and the end.
        shards_at_once: shards whose rows are mixed with each other.
        seed: the run's seed; `stream`: which of several sources.
    """

    def __init__(self, row_starts: np.ndarray, shards_at_once: int, seed: int, stream: int = 0):
        self.row_starts = row_starts
        self.count = int(row_starts[-1])
        self.shards_at_once = shards_at_once
        self.seed, self.stream = seed, stream
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def rows_at(self, positions: np.ndarray) -> np.ndarray:
        """Rows at positions of the endless order."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, places = np.divmod(positions, self.count)
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            shards, ends = self._shards(epoch)
            in_epoch = np.flatnonzero(epochs == epoch)
            windows = np.searchsorted(ends, places[in_epoch], side="right") // self.shards_at_once
            for window in np.unique(windows).tolist():
                here = in_epoch[windows == window]
                rows[here] = self._rows_of_window(places[here], shards, ends, epoch, window)
        return rows

    def _rows_of_window(self, places, shards, ends, epoch: int, window: int) -> np.ndarray:
        first, last = window * self.shards_at_once, min((window + 1) * self.shards_at_once, len(shards))
        begin = int(ends[first - 1]) if first else 0
        mixed = begin + permute(places - begin, int(ends[last - 1]) - begin, self.seed, epoch, self._key(window + 1))
        slots = np.searchsorted(ends, mixed, side="right")
        shard = shards[slots]
        before = np.where(slots > 0, ends[slots - 1], 0)
        return self.row_starts[shard] + mixed - before

    def shards_from(self, position: int) -> list[int]:
        """Shards that are read together at a position, then those that come after them."""
        epoch, place = divmod(int(position), self.count)
        shards, ends = self._shards(epoch)
        window = int(np.searchsorted(ends, place, side="right")) // self.shards_at_once
        found = shards[window * self.shards_at_once : (window + 2) * self.shards_at_once].tolist()
        if (window + 1) * self.shards_at_once >= len(shards):
            found += self._shards(epoch + 1)[0][: self.shards_at_once].tolist()
        return list(dict.fromkeys(found))

    def _shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards in the order of an epoch, and where the rows of each end in it."""
        if epoch not in self._epochs:
            sizes = np.diff(self.row_starts)
            shards = permute(np.arange(len(sizes)), len(sizes), self.seed, epoch, self._key(0))
            shards = shards[sizes[shards] > 0]
            self._epochs = {key: value for key, value in self._epochs.items() if key == epoch - 1}
            self._epochs[epoch] = shards, np.cumsum(sizes[shards])
        return self._epochs[epoch]

    def _key(self, number: int) -> int:
        return (self.stream << 32) + number
