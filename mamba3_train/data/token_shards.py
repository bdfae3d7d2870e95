"""Token shards: the prepared corpus on disk.

A folder holds, for every shard, `NAME.bin` (tokens, flat little-endian uint16 or uint32, `numpy.memmap`-able) and
`NAME.offsets.npy` (int64, where each document begins, and the end), beside `tokenizer.json` and `manifest.json`.
Files are written in a temporary folder and moved here; the manifest comes last, so a folder with a manifest is whole.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mamba3_train.data.corpus_files import MANIFEST, LocalFiles, RemoteFiles, StoredFile, corpus_files
from mamba3_train.errors import UserError

FORMAT = "mamba3_train.token_shards"
VERSION = 1

Corpus = str | Path | LocalFiles | RemoteFiles
"""A prepared corpus: its folder, its address (s3://, gs://, https://, …), or its files."""


@dataclass(frozen=True)
class Shard:
    """One shard: its name without ending, the source it came from, its counts and the SHA-256 of both files."""

    name: str
    source: str
    tokens: int
    documents: int
    sha256: str
    offsets_sha256: str

    def files(self, dtype: str) -> tuple[StoredFile, StoredFile]:
        """Its tokens and its offsets; 128 bytes is the header that numpy writes before a one-dimensional array."""
        return (
            StoredFile(f"{self.name}.bin", self.tokens * np.dtype(dtype).itemsize, self.sha256),
            StoredFile(f"{self.name}.offsets.npy", 128 + 8 * (self.documents + 1), self.offsets_sha256),
        )


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

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decides what every row holds: the shards' contents, in order, and the tokenizer."""
        shards = [(split, *astuple(shard)) for split, of_split in self.splits.items() for shard in of_split]
        return hashlib.sha256(json.dumps([shards, self.tokenizer_fingerprint]).encode()).hexdigest()

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

    def files(self) -> list[StoredFile]:
        """Both files of every shard."""
        return [file for shard in self.shards() for file in shard.files(self.dtype)]


def token_dtype(vocab_size: int) -> np.dtype:
    """Smallest type of the format that holds every id."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def read_manifest(corpus: Corpus) -> Manifest:
    """Read and check the manifest of a prepared corpus.

    Raises:
        UserError: there is none, or it is not one this version understands.
    """
    try:
        content = corpus_files(corpus).read(MANIFEST)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"no prepared corpus at {corpus}: there is no {MANIFEST}") from error
    try:
        content = json.loads(content)
        if (content.pop("format"), content.pop("version")) != (FORMAT, VERSION):
            raise ValueError(f"format is not {FORMAT} version {VERSION}")
        splits = {name: tuple(Shard(**shard) for shard in shards) for name, shards in content.pop("splits").items()}
        return Manifest(splits=splits, **content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{corpus}/{MANIFEST} is not a readable manifest ({error}); prepare it again") from error


class TokenSplit:
    """The documents of one split, one after another, as a single array of tokens that stays on the disk.

    Shards are memory-mapped when first read. Pickling carries the description only, so loader workers map for
    themselves.

    Args:
        corpus: the prepared corpus.
        manifest: its manifest.
        split: "train" or "validation".
        source: only this source's documents; None takes all, source after source.
        most_open: shards that stay mapped, those used last; None keeps all.

    Raises:
        UserError: a shard is missing or has another size than the manifest says; later, when one is read, that it
            changed since.
    """

    def __init__(
        self, corpus: Corpus, manifest: Manifest, split: str, source: str | None = None, most_open: int | None = None
    ):
        self.files = corpus_files(corpus)
        shards = manifest.splits.get(split, ())
        self.shards = tuple(shard for shard in shards if source in (None, shard.source))
        self.dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self.starts = np.cumsum([0, *(shard.tokens for shard in self.shards)])
        self.tokens = int(self.starts[-1])
        self.most_open = most_open
        self._stored = [shard.files(manifest.dtype) for shard in self.shards]
        self.files.expect(file for files in self._stored for file in files)
        self._open: dict[int, tuple[np.ndarray, ...]] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}

    def attach(self, files: list[StoredFile]) -> None:
        """Give every shard one more file, an .npy array, which `shard` then returns after the others."""
        self._stored = [(*stored, file) for stored, file in zip(self._stored, files, strict=True)]
        self.files.expect(files)

    def shard(self, number: int) -> tuple[np.ndarray, ...]:
        """Tokens and document offsets of one shard, and what was attached."""
        for file in self._stored[number]:
            self.files.check_unchanged(file.name)
        arrays = self._open.pop(number, None)
        if arrays is None:
            arrays = self._map(number)
            while self.most_open is not None and len(self._open) >= self.most_open:
                del self._open[next(iter(self._open))]
        self._open[number] = arrays  # the last one is the one used last
        return arrays

    def _map(self, number: int) -> tuple[np.ndarray, ...]:
        with ExitStack() as stack:
            tokens, *others = (stack.enter_context(self.files.open(file.name)) for file in self._stored[number])
            return map_tokens(tokens, self.dtype), *map(map_npy, others)

    def bytes(self, number: int) -> int:
        """Size of a shard's files together."""
        return sum(file.bytes for file in self._stored[number])

    @property
    def is_remote(self) -> bool:
        """Whether shards come over a network."""
        return isinstance(self.files, RemoteFiles)

    def fetch_ahead(self, numbers: Iterable[int]) -> None:
        """Have shards fetched that are read soon, where the corpus is remote."""
        self.files.fetch_ahead([file.name for number in numbers for file in self._stored[number]])

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
            for here in groups(numbers):
                number = numbers[here[0]]
                stored, offsets = self.shard(int(number))[:2]
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


def groups(values: np.ndarray) -> list[np.ndarray]:
    """Places of equal values, group by group."""
    order = np.argsort(values, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(values[order])) + 1)


def _ranges(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All integers of the ranges [first, last), one range after another, and which range each is from."""
    counts = last - first
    owner = np.repeat(np.arange(len(first)), counts)
    return owner, np.arange(len(owner)) + (first - np.cumsum(counts) + counts)[owner]


def map_tokens(file: BinaryIO, dtype: np.dtype) -> np.ndarray:
    """Map a flat file of tokens, which may then be closed."""
    # Slicing a plain array costs a fraction of slicing the memmap subclass; the map stays alive as its base.
    return np.memmap(file, dtype=dtype, mode="r").view(np.ndarray)


def map_npy(file: BinaryIO) -> np.ndarray:
    """Map the array of an .npy file, which may then be closed."""
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return np.memmap(file, dtype=dtype, mode="r", offset=file.tell(), shape=shape).view(np.ndarray)
