"""Token shards: the prepared corpus on disk.

A folder holds, for every shard, `NAME.bin` (tokens, flat little-endian uint16 or uint32, `numpy.memmap`-able) and
`NAME.offsets.npy` (int64, where each document begins, and the end), beside `tokenizer.json` and `manifest.json`.
Files are written in a temporary folder and moved here; the manifest comes last, so a folder with a manifest is whole.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mamba3_train.data.tokenizer import FILE_NAME, Tokenizer
from mamba3_train.errors import UserError

MANIFEST = "manifest.json"
FORMAT = "mamba3_train.token_shards"
VERSION = 1


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


def publish(path: Path, content: bytes) -> None:
    """Write a file so that it is either absent, or old, or complete on the disk: never half written."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(content)
        _sync(file)
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make creations and renamings in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Publish a corpus: everything the manifest names must be in place already."""
    content = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    publish(folder / MANIFEST, json.dumps(content, indent=2).encode() + b"\n")


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


class ShardWriter:
    """Writes the documents of one split of one source as shards of about `shard_tokens` tokens.

    A shard ends with the document that reaches the size; shards are named `{source}-{split}-{number}`.

    Args:
        folder: where the shards go; not to be read from before they are published by a manifest.
        dtype: of the stored tokens.
        state: what `state()` returned; writing goes on from there, whatever was written after it is dropped.
    """

    def __init__(
        self, folder: Path, source: str, split: str, dtype: np.dtype, shard_tokens: int, state: dict | None = None
    ):
        self.folder, self.source, self.split = folder, source, split
        self.dtype, self.shard_tokens = dtype, shard_tokens
        self.shards = [Shard(**shard) for shard in state["shards"]] if state else []
        self._tokens = self._documents = 0
        self._bin = self._lengths = None
        if state and state["documents"]:
            self._reopen(state["tokens"], state["documents"])

    @property
    def tokens(self) -> int:
        """Tokens written, in all shards."""
        return sum(shard.tokens for shard in self.shards) + self._tokens

    def state(self) -> dict:
        """Plain values that describe all that was written; what they describe is safe on the disk."""
        for file in (self._bin, self._lengths):
            if file is not None:
                _sync(file)
        return {"shards": [asdict(s) for s in self.shards], "tokens": self._tokens, "documents": self._documents}

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: their tokens one after another, and the length of each (all at least 1)."""
        ends = np.cumsum(lengths)
        begin = first = 0
        while first < len(lengths):
            if self._bin is None:
                self._open("wb")
            room = self.shard_tokens - self._tokens
            last = min(int(np.searchsorted(ends, begin + room)), len(lengths) - 1)
            self._append(tokens[begin : ends[last]], lengths[first : last + 1])
            begin, first = int(ends[last]), last + 1
            if self._tokens >= self.shard_tokens:
                self.close()

    def _path(self, ending: str) -> Path:
        return self.folder / f"{self.source}-{self.split}-{len(self.shards):05d}.{ending}"

    def _open(self, mode: str) -> None:
        self._bin = open(self._path("bin"), mode)  # noqa: SIM115
        self._lengths = open(self._path("lengths"), mode)  # noqa: SIM115
        self._hash = hashlib.sha256()

    def _reopen(self, tokens: int, documents: int) -> None:
        os.truncate(self._path("bin"), tokens * self.dtype.itemsize)
        os.truncate(self._path("lengths"), documents * 8)
        self._open("ab")
        with open(self._path("bin"), "rb") as file:
            while block := file.read(1 << 24):
                self._hash.update(block)
        self._tokens, self._documents = tokens, documents

    def _append(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        data = np.ascontiguousarray(tokens, dtype=self.dtype).data
        self._bin.write(data)
        self._hash.update(data)
        self._lengths.write(np.ascontiguousarray(lengths, dtype="<i8").data)
        self._tokens += len(tokens)
        self._documents += len(lengths)

    def close(self) -> None:
        """Finish the shard being written, if any."""
        if self._bin is None:
            return
        self.state()
        self._bin.close()
        self._lengths.close()
        offsets = np.concatenate([[0], np.fromfile(self._path("lengths"), dtype="<i8").cumsum()]).astype("<i8")
        with open(self._path("offsets.npy"), "wb") as file:
            np.save(file, offsets)
            _sync(file)
        self.shards.append(
            Shard(
                name=self._path("bin").stem,
                source=self.source,
                tokens=self._tokens,
                documents=self._documents,
                sha256=self._hash.hexdigest(),
                offsets_sha256=_sha256(self._path("offsets.npy")),
            )
        )
        self._bin = self._lengths = None
        self._tokens = self._documents = 0


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
        UserError: a shard is missing or has another size than the manifest says.
    """

    def __init__(self, folder: str | Path, manifest: Manifest, split: str, source: str | None = None):
        self.folder = Path(folder)
        shards = manifest.splits.get(split, ())
        self.shards = tuple(shard for shard in shards if source in (None, shard.source))
        self.dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self.starts = np.cumsum([0, *(shard.tokens for shard in self.shards)])
        self.tokens = int(self.starts[-1])
        check_sizes(self.folder, self.shards, self.dtype)
        self._open: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}

    def shard(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and document offsets of one shard."""
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
        tokens = np.empty((len(starts), width), dtype=self.dtype)
        rows, columns = [], []
        for row, start in enumerate(np.asarray(starts).tolist()):
            for number, begin, end, column in self._pieces(start, width):
                stored, offsets = self.shard(number)
                tokens[row, column : column + end - begin] = stored[begin:end]
                first, last = np.searchsorted(offsets, (begin, end))
                found = offsets[first:last] - (begin - column)
                rows.append(np.full(len(found), row))
                columns.append(found)
        if not rows:
            return tokens, np.empty(0, np.int64), np.empty(0, np.int64)
        boundary_rows, boundary_columns = np.concatenate(rows), np.concatenate(columns)
        inside = boundary_columns > 0
        return tokens, boundary_rows[inside], boundary_columns[inside]

    def _pieces(self, start: int, width: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (shard, begin, end, column): the parts of shards that make up one row."""
        number = int(np.searchsorted(self.starts, start, side="right")) - 1
        column = 0
        while column < width:
            begin = start + column - int(self.starts[number])
            end = min(begin + width - column, self.shards[number].tokens)
            yield number, begin, end, column
            column += end - begin
            number += 1


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


def _sha256(path: Path) -> str:
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
    for shard in manifest.shards():
        check_sizes(folder, (shard,), dtype)
        for path, expected in (
            (folder / f"{shard.name}.bin", shard.sha256),
            (folder / f"{shard.name}.offsets.npy", shard.offsets_sha256),
        ):
            if _sha256(path) != expected:
                raise UserError(f"corrupt shard: {path} does not have the SHA-256 of its manifest; prepare it again")
    if Tokenizer.of_corpus(folder, manifest.end_of_document_id).fingerprint != manifest.tokenizer_fingerprint:
        raise UserError(f"{folder / FILE_NAME} is not the tokenizer that these shards were made with")
    return manifest
