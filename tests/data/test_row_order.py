"""Shards shuffled a few at a time: every row once an epoch, few shards at once, found from its position alone."""

import numpy as np
import pytest

from mamba3_train.data.row_order import ShardOrder

SIZES = [70, 0, 31, 50, 1, 64, 23, 12]
STARTS = np.cumsum([0, *SIZES])


@pytest.mark.parametrize("shards_at_once", [1, 2, 3, 8, 100])
def test_every_row_comes_once_an_epoch(shards_at_once):
    order = ShardOrder(STARTS, shards_at_once, seed=5)
    rows = order.rows_at(np.arange(3 * order.count)).reshape(3, -1)
    assert np.array_equal(np.sort(rows, axis=1), np.tile(np.arange(order.count), (3, 1)))
    assert (rows[0] == rows[1]).sum() < 20


def test_few_shards_are_read_at_once():
    order = ShardOrder(STARTS, 2, seed=5)
    shards = np.searchsorted(STARTS, order.rows_at(np.arange(2 * order.count)), side="right") - 1
    last = {shard: np.flatnonzero(shards[: order.count] == shard)[[0, -1]] for shard in set(shards.tolist())}
    for position in range(order.count):
        assert sum(begin <= position <= end for begin, end in last.values()) <= 2
    mixed = sum(len(set(shards[i : i + 20].tolist())) == 2 for i in range(0, order.count, 20))
    assert mixed > order.count / 20 / 2, "shards that are read together are mixed"


def test_shards_are_told_before_their_need():
    order = ShardOrder(STARTS, 2, seed=1)
    shards = np.searchsorted(STARTS, order.rows_at(np.arange(2 * order.count)), side="right") - 1
    for position in range(order.count):
        soon = order.shards_from(position)
        assert len(soon) <= 4
        assert set(shards[position : position + 40].tolist()) <= set(soon)
        assert shards[position] in soon[:2]


def test_any_position_alone():
    order = ShardOrder(STARTS, 3, seed=2, stream=7)
    rows = order.rows_at(np.arange(1000))
    for position in (0, 3, 250, 251, 500, 999):
        assert ShardOrder(STARTS, 3, seed=2, stream=7).rows_at(np.array([position])) == rows[position]
    assert (rows != ShardOrder(STARTS, 3, seed=2, stream=8).rows_at(np.arange(1000))).mean() > 0.9


def test_order_is_fixed_for_ever():
    """A run resumed with a later version must go on with the same data: these numbers may never change."""
    assert ShardOrder(STARTS, 2, seed=1).rows_at(np.arange(8)).tolist() == [156, 182, 154, 160, 195, 164, 172, 170]
