"""The set of digests against Python's own, through collisions, repeats within a batch and growth."""

import numpy as np

from mamba3_train.data.duplicates import SMALLEST, DigestSet


def test_same_answers_as_a_set(tmp_path):
    chance = np.random.default_rng(0)
    # Half of all digests share 64 slots, so that probing has work to do; a third come again.
    pool = chance.integers(0, 2**63, (3000, 2), dtype=np.uint64)
    pool[::2, 0] &= np.uint64(63)
    pool[0] = 0
    table, seen, repeats = DigestSet(tmp_path / "table"), set(), 0
    for _ in range(20):
        digests = pool[chance.integers(0, len(pool), 200)]
        expected = []
        for digest in map(tuple, digests.tolist()):
            expected.append(digest not in seen)
            seen.add(digest)
        assert table.add(digests).tolist() == expected
        repeats += expected.count(False)
    assert table.count == len(seen)
    assert repeats > 1000


def test_growth_forgets_nothing(tmp_path):
    digests = np.random.default_rng(1).integers(0, 2**63, (SMALLEST, 2), dtype=np.uint64)
    table = DigestSet(tmp_path / "table")
    before = (tmp_path / "table").stat().st_size
    for begin in range(0, len(digests), 5000):
        assert table.add(digests[begin : begin + 5000]).all()
    assert (tmp_path / "table").stat().st_size > before
    assert not table.add(digests).any()
    assert table.count == len(digests)
