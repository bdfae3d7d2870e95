"""Token shards: the prepared corpus on disk.

A folder holds, for every shard, `NAME.bin` (tokens, flat little-endian uint16 or uint32, `numpy.memmap`-able) and
`NAME.offsets.npy` (int64, where each document begins, and the end), beside `tokenizer.json` and `manifest.json`.
Files are written in a temporary folder and moved here; the manifest comes last, so a folder with a manifest is whole.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mamba3_train.data.tokenizer import FILE_NAME, Tokenizer
from mamba3_train.errors import UserError

MANIFEST = "manifest.json"
FORMAT = "mamba3_train.token_shards"
VERSION = 1

# How long a look at a shard's size and time of change is good for: a shared file system must not be asked at every row.
RECHECK_SECONDS = 30.0


@dataclass(frozen=True)
class Shard:
    """One shard: its name without ending, the source it came from, its counts and the SHA-256 of both files."""

    name: str
    source: str
    tokens: int
    documents: int
    sha256: str
    offsets_sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds.

    `dtype` is "uint16" or "uint32"; `splits` maps "train" and "validation" to their shards, in order;
    `preparation` tells how the corpus was made.
    """

    dtype: str
    vocab_size: int
    end_of_document_id: int
    tokenizer_fingerprint: str
    splits: dict[str, tuple[Shard, ...]]
    preparation: dict

    def tokens(self, split: str) -> int:
        """Tokens of a split, over all shards."""
        return sum(shard.tokens for shard in self.splits.get(split, ()))

    def sources(self) -> list[str]:
        """Names of the sources, in order."""
        return list(dict.fromkeys(shard.source for shard in self.shards()))

    def shards(self) -> Iterator[Shard]:
        """Every shard of every split."""
        for shards in self.splits.values():
            yield from shards


def token_dtype(vocab_size: int) -> np.dtype:
    """Smallest type of the format that holds every id."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check the manifest of a prepared folder.

    Raises:
        UserError: there is none, or it is not one this version understands.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise UserError(f"no prepared corpus at {folder}: {path} does not exist")
    try:
        content = json.loads(path.read_text())
        if (content.pop("format"), content.pop("version")) != (FORMAT, VERSION):
            raise ValueError(f"format is not {FORMAT} version {VERSION}")
        splits = {name: tuple(Shard(**shard) for shard in shards) for name, shards in content.pop("splits").items()}
        return Manifest(splits=splits, **content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a readable manifest ({error}); prepare the corpus again") from error


class TokenSplit:
    """The documents of one split, one after another, as a single array of tokens that stays on the disk.

    Shards are memory-mapped when first read. Pickling carries the description only, so loader workers map for
    themselves.

    Args:
        folder: the prepared folder.
        manifest: its manifest.
        split: "train" or "validation".
        source: only this source's documents; None takes all, source after source.

    Raises:
        UserError: a shard is missing or has another size than the manifest says; later, when one is read, that it
            changed since.
    """

    def __init__(self, folder: str | Path, manifest: Manifest, split: str, source: str | None = None):
        self.folder = Path(folder)
        shards = manifest.splits.get(split, ())
        self.shards = tuple(shard for shard in shards if source in (None, shard.source))
        self.dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self.starts = np.cumsum([0, *(shard.tokens for shard in self.shards)])
        self.tokens = int(self.starts[-1])
        check_sizes(self.folder, self.shards, self.dtype)
        self._stamps = [self._stamp(number) for number in range(len(self.shards))]
        self._checked: dict[int, float] = {}
        self._open: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}, "_checked": {}}

    def _stamp(self, number: int) -> list[tuple[int, int, int]]:
        """What changes when somebody writes to a shard or puts another in its place."""
        name = self.shards[number].name
        found = [os.stat(self.folder / f"{name}.{ending}") for ending in ("bin", "offsets.npy")]
        return [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in found]

    def _check_unchanged(self, number: int) -> None:
        """Refuse a shard that is not the one found at the start; reading a truncated map would end the process."""
        now = time.monotonic()
        if now - self._checked.get(number, -np.inf) < RECHECK_SECONDS:
            return
        try:
            same = self._stamp(number) == self._stamps[number]
        except FileNotFoundError:
            same = False
        if not same:
            path = self.folder / f"{self.shards[number].name}.bin"
            raise UserError(f"shard changed while it was being read: {path}; prepare the corpus again, then resume")
        self._checked[number] = now

    def shard(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and document offsets of one shard."""
        self._check_unchanged(number)
        if number not in self._open:
            name = self.shards[number].name
            tokens = np.memmap(self.folder / f"{name}.bin", dtype=self.dtype, mode="r")
            offsets = np.load(self.folder / f"{name}.offsets.npy", mmap_mode="r", allow_pickle=False)
            # Slicing a plain array costs a fraction of slicing the memmap subclass; the map stays alive as its base.
            self._open[number] = tokens.view(np.ndarray), offsets.view(np.ndarray)
        return self._open[number]

    def read(self, starts: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cut rows of `width` tokens.

        Args:
            starts: (rows,) first token of each row.

        Returns:
            tokens: (rows, width) in the stored type.
            boundary_rows, boundary_columns: (n,) where a document begins inside a row; columns in [1, width).
        """
        positions = np.asarray(starts, dtype=np.int64)
        tokens = np.empty((len(positions), width), dtype=self.dtype)
        rows, columns = np.arange(len(positions)), np.zeros(len(positions), dtype=np.int64)
        boundary_rows, boundary_columns = [columns[:0]], [columns[:0]]
        while len(rows):  # once for all rows, and again for what lies in the shards that follow
            numbers = np.searchsorted(self.starts, positions, side="right") - 1
            ends = np.minimum(positions + width - columns, self.starts[numbers + 1])
            for here in _groups(numbers):
                number = numbers[here[0]]
                stored, offsets = self.shard(int(number))
                begin, end = positions[here] - self.starts[number], ends[here] - self.starts[number]
                for row, column, first, last in zip(
                    rows[here].tolist(), columns[here].tolist(), begin.tolist(), end.tolist(), strict=True
                ):
                    tokens[row, column : column + last - first] = stored[first:last]
                first, last = np.searchsorted(offsets, begin), np.searchsorted(offsets, end)
                owner, found = _ranges(first, last)
                boundary_rows.append(rows[here][owner])
                boundary_columns.append(offsets[found] + (columns[here] - begin)[owner])
            columns = columns + ends - positions
            more = columns < width
            rows, columns, positions = rows[more], columns[more], ends[more]
        boundary_rows, boundary_columns = np.concatenate(boundary_rows), np.concatenate(boundary_columns)
        inside = boundary_columns > 0
        return tokens, boundary_rows[inside], boundary_columns[inside]


def _groups(values: np.ndarray) -> list[np.ndarray]:
    """Places of equal values, group by group."""
    order = np.argsort(values, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(values[order])) + 1)


def _ranges(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All integers of the ranges [first, last), one range after another, and which range each is from."""
    counts = last - first
    owner = np.repeat(np.arange(len(first)), counts)
    return owner, np.arange(len(owner)) + (first - np.cumsum(counts) + counts)[owner]


def check_sizes(folder: Path, shards: tuple[Shard, ...], dtype: np.dtype) -> None:
    """Refuse a missing or truncated shard, by existence and size alone."""
    for shard in shards:
        for path, size in (
            (folder / f"{shard.name}.bin", shard.tokens * dtype.itemsize),
            # 128 bytes: the header that numpy writes before a one-dimensional array.
            (folder / f"{shard.name}.offsets.npy", 128 + 8 * (shard.documents + 1)),
        ):
            if not path.is_file():
                raise UserError(f"shard file missing: {path}; prepare the corpus again")
            if path.stat().st_size != size:
                raise UserError(
                    f"corrupt shard: {path} has {path.stat().st_size:,} bytes, its manifest says {size:,}; "
                    "prepare the corpus again"
                )


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: str | Path) -> Manifest:
    """Read every byte of a prepared corpus and compare it with the manifest.

    Raises:
        UserError: naming the first shard that is missing or differs, or a tokenizer that is not the one used.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    dtype = np.dtype(manifest.dtype)
    shards = tuple(manifest.shards())
    check_sizes(folder, shards, dtype)
    expected = {folder / f"{shard.name}.bin": shard.sha256 for shard in shards}
    expected |= {folder / f"{shard.name}.offsets.npy": shard.offsets_sha256 for shard in shards}
    with ThreadPoolExecutor() as executor:  # hashing lets other threads run
        for path, found in zip(expected, executor.map(sha256, expected), strict=True):
            if found != expected[path]:
                raise UserError(f"corrupt shard: {path} does not have the SHA-256 of its manifest; prepare it again")
    if Tokenizer.of_corpus(folder, manifest.end_of_document_id).fingerprint != manifest.tokenizer_fingerprint:
        raise UserError(f"{folder / FILE_NAME} is not the tokenizer that these shards were made with")
    return manifest
