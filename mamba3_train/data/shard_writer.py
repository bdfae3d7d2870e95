"""Writing token shards: files that are either absent or whole, whatever happens to the process that writes them."""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mamba3_train.data.corpus_files import MANIFEST, LocalFiles
from mamba3_train.data.token_shards import FORMAT, VERSION, Manifest, Shard


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
                offsets_sha256=LocalFiles(self.folder).sha256(self._path("offsets.npy").name),
            )
        )
        self._bin = self._lengths = None
        self._tokens = self._documents = 0
