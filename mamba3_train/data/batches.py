"""What a loader hands out: map-style data sets whose items are whole batches, packed; see `packing`."""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from mamba3_train.data.best_fit import BestFitRows
from mamba3_train.data.mixture import Mixture
from mamba3_train.data.packing import PADDING, CutRows, Rows, pack, scatter
from mamba3_train.data.row_order import RowOrder, ShardOrder


class TrainingBatches(Dataset):
    """The endless training order: the index is a range of its positions, the item is their batch.

    Args:
        sources: rows by source name.
        mixture: which source each position comes from; None takes the only source.
        seed: of the shuffling of each source, anew in each of its epochs.
        shuffle_shards: shards of a source that are shuffled at a time; None shuffles all of them together.
    """

    def __init__(
        self,
        sources: Mapping[str, CutRows | BestFitRows],
        mixture: Mixture | None,
        seed: int,
        shuffle_shards: int | None = None,
    ):
        self.sources = dict(sources)
        self.mixture = mixture
        self._orders = {}
        for name, rows in self.sources.items():
            # By name, so that a source keeps its order when others join.
            stream = zlib.crc32(name.encode()) if mixture else 0
            if shuffle_shards is None:
                self._orders[name] = RowOrder(rows.count, seed, stream)
            else:
                self._orders[name] = ShardOrder(rows.row_starts, shuffle_shards, seed, stream)

    def __getitem__(self, positions: Sequence[int]) -> dict[str, torch.Tensor]:
        if not isinstance(positions, range | np.ndarray):
            raise TypeError(
                "an item is a range of positions, not one: something replaced the sampler; "
                "set use_distributed_sampler=False in the Trainer"
            )
        positions = np.asarray(positions, dtype=np.int64)
        if self.mixture is None:
            (name,) = self.sources
            return pack(self._read(name, positions))
        chosen, indices = self.mixture.assign(positions)
        parts = []
        for number in np.unique(chosen):
            places = np.flatnonzero(chosen == number)
            parts.append((places, self._read(self.mixture.sources[number], indices[places])))
        return pack(scatter(parts, len(positions)))

    def _read(self, name: str, indices: np.ndarray) -> Rows:
        rows, order = self.sources[name], self._orders[name]
        if rows.split.is_remote:
            shuffled_by_shard = isinstance(order, ShardOrder)
            soon = order.shards_from(indices[0]) if shuffled_by_shard else range(len(rows.split.shards))
            rows.split.fetch_ahead(soon)
        return rows.read(order.rows_at(indices))

    def epochs(self, position: int) -> dict[str, float]:
        """How often each source has been read through before a position, fractions included."""
        if self.mixture is None:
            return {name: position / rows.count for name, rows in self.sources.items()}
        consumed = self.mixture.consumed(position)
        # A source without a whole row may be there as long as no row of it is wanted.
        return {name: consumed[name] / max(rows.count, 1) for name, rows in self.sources.items()}


class ValidationBatches(Dataset):
    """The first `count` rows in fixed order, as micro-batches of one rank.

    Every rank gets the same number of full micro-batches, whatever `count` is: rows beyond the end repeat the last one
    with every label ignored, so that the set of targets does not depend on the number of ranks.
    """

    def __init__(self, rows: CutRows | BestFitRows, count: int, micro_batch_size: int, rank: int, world_size: int):
        self.rows = rows
        self.count = count
        self.micro_batch_size = micro_batch_size
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return -(-self.count // (self.micro_batch_size * self.world_size))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        first = (index * self.world_size + self.rank) * self.micro_batch_size
        positions = np.arange(first, first + self.micro_batch_size)
        batch = pack(self.rows.read(np.minimum(positions, self.count - 1)))
        batch["marks"][torch.from_numpy(positions >= self.count)] |= PADDING
        return batch
