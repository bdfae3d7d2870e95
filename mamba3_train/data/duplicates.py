"""Exact duplicates: a set of 128-bit digests that lives in a file, so that memory does not grow with the corpus."""

import os
from pathlib import Path

import numpy as np

SMALLEST = 1 << 16
CHUNK = 1 << 16


class DigestSet:
    """Digests seen so far, in an open-addressing hash table at most half full, mapped from a file.

    Args:
        path: the table's file, made anew; it doubles as needed (32 to 64 bytes a digest).
    """

    def __init__(self, path: Path):
        self.path = path
        self.count = 0
        self._table = self._new(SMALLEST)

    def add(self, digests: np.ndarray) -> np.ndarray:
        """Add digests and tell which are new.

        Args:
            digests: (n, 2) uint64.

        Returns:
            (n,) bool: False where the digest was there already, or earlier among these.
        """
        while 2 * (self.count + len(digests)) > len(self._table):
            self._grow()
        _, first = np.unique(digests, axis=0, return_index=True)
        first.sort()
        new = np.zeros(len(digests), dtype=bool)
        new[first[self._insert(digests[first])]] = True
        self.count += int(new.sum())
        return new

    def _insert(self, digests: np.ndarray) -> np.ndarray:
        """Insert distinct digests by linear probing, all at once; (n,) bool, which were new."""
        table, mask = self._table, np.uint64(len(self._table) - 1)
        # All zeros marks an empty slot; the one digest that is zero shares its fate with the digest (0, 1).
        digests = np.where((digests == 0).all(axis=1, keepdims=True), np.uint64([0, 1]), digests)
        new = np.zeros(len(digests), dtype=bool)
        waiting = np.arange(len(digests))
        slots = digests[:, 0] & mask
        while len(waiting):
            found = table[slots]
            empty = (found == 0).all(axis=1)
            # Of several that want one empty slot the first takes it; the others look at it again and move on.
            _, first = np.unique(np.where(empty, slots, np.uint64(len(table)) + slots), return_index=True)
            takes = np.zeros(len(waiting), dtype=bool)
            takes[first] = True
            takes &= empty
            table[slots[takes]] = digests[waiting[takes]]
            new[waiting[takes]] = True
            there = (found == digests[waiting]).all(axis=1)
            again = ~takes & ~there
            slots = np.where(empty, slots, (slots + np.uint64(1)) & mask)[again]
            waiting = waiting[again]
        return new

    def _grow(self) -> None:
        old, self._table = self._table, self._new(2 * len(self._table))
        for begin in range(0, len(old), CHUNK):
            chunk = old[begin : begin + CHUNK]
            self._insert(chunk[(chunk != 0).any(axis=1)])

    def _new(self, slots: int) -> np.ndarray:
        # The old file stays readable through its map until that is dropped.
        self.path.unlink(missing_ok=True)
        with open(self.path, "wb") as file:
            # Reserved now: on a full disk, writing to a map without room behind it would end the process.
            os.posix_fallocate(file.fileno(), 0, slots * 16)
        return np.memmap(self.path, dtype=np.uint64, mode="r+", shape=(slots, 2)).view(np.ndarray)
