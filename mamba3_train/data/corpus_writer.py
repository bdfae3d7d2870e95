"""A corpus while it is being made: its shards, and the journal from which an interrupted preparation goes on."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mamba3_train.data.corpus_files import MANIFEST
from mamba3_train.data.duplicates import DigestSet
from mamba3_train.data.shard_writer import ShardWriter, publish, sync_folder, write_manifest
from mamba3_train.data.token_shards import Manifest, Shard, token_dtype
from mamba3_train.data.tokenizer import FILE_NAME, Tokenizer
from mamba3_train.data.tokenizing import TokenBatch

WORK_FOLDER = ".preparing"
JOURNAL = "journal.json"
SPLITS = ("train", "validation")


class CorpusWriter:
    """Writes a corpus under `folder/.preparing` and publishes it in `folder` when it is whole.

    Args:
        folder: where the corpus goes. A journal there is taken up: what was written after it is dropped.
        tokenizer: what the tokens are made with.
        sources: names of the sources, in order.
        description: how the corpus is made; goes into the manifest.
        validation_fraction, shard_tokens, deduplicate: as in `Preparation`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tokenizer: Tokenizer,
        sources: Iterable[str],
        description: dict,
        validation_fraction: float,
        shard_tokens: int,
        deduplicate: bool,
    ):
        self.folder, self.work = folder, folder / WORK_FOLDER
        self.tokenizer = tokenizer
        self.description = description
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.held_out_below = np.uint64(min(int(validation_fraction * 2**64), 2**64 - 1))
        journal = read_journal(folder) or {"sources": {}, "digests": 0}
        empty = {"position": None, "finished": False, "documents": 0, "duplicates": 0, "writers": {}}
        self.progress = {name: journal["sources"].get(name, empty | {"writers": {}}) for name in sources}
        self._writers = {
            (name, split): ShardWriter(
                self.work, name, split, self.dtype, shard_tokens, self.progress[name]["writers"].get(split)
            )
            for name in self.progress
            for split in SPLITS
        }
        self._digests = _DigestLog(self.work, journal["digests"]) if deduplicate else None

    def add(self, source: str, batch: TokenBatch) -> None:
        """Append documents to the splits their hashes choose; of equal documents, the first only."""
        new = self._digests.add(batch.digests) if self._digests else np.ones(len(batch.lengths), dtype=bool)
        held_out = batch.digests[:, 0] < self.held_out_below
        for split, chosen in (("train", new & ~held_out), ("validation", new & held_out)):
            if chosen.all():
                self._writers[source, split].add(batch.tokens, batch.lengths)
            elif chosen.any():
                tokens = batch.tokens[np.repeat(chosen, batch.lengths)]
                self._writers[source, split].add(tokens, batch.lengths[chosen])
        self.progress[source]["documents"] += len(batch.lengths)
        self.progress[source]["duplicates"] += int((~new).sum())

    def tokens(self, source: str) -> int:
        """Tokens of a source written so far."""
        return sum(self._writers[source, split].tokens for split in SPLITS)

    def checkpoint(self, source: str, position: dict | None, finished: bool = False) -> None:
        """Make everything added so far safe; a preparation killed after this reads on from `position`."""
        self.progress[source] |= {"position": position, "finished": finished}
        for (name, split), writer in self._writers.items():
            if finished and name == source:
                writer.close()
            self.progress[name]["writers"][split] = writer.state()
        journal = {
            "description": self.description,
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "end_of_document": self.tokenizer.end_of_document,
            "sources": self.progress,
            "digests": self._digests.save() if self._digests else 0,
        }
        publish(self.work / JOURNAL, json.dumps(journal).encode())

    def publish(self) -> Manifest:
        """Move the shards into place and write the manifest; may be repeated after a kill at any point."""
        splits: dict[str, tuple[Shard, ...]] = {
            split: tuple(shard for name in self.progress for shard in self._writers[name, split].shards)
            for split in SPLITS
        }
        for shards in splits.values():
            for shard in shards:
                for ending in ("offsets.npy", "bin"):
                    file = f"{shard.name}.{ending}"
                    if (self.work / file).exists():
                        os.replace(self.work / file, self.folder / file)
        sync_folder(self.folder)
        manifest = Manifest(
            dtype=self.dtype.name,
            vocab_size=self.tokenizer.vocab_size,
            end_of_document_id=self.tokenizer.end_of_document_id,
            tokenizer_fingerprint=self.tokenizer.fingerprint,
            splits=splits,
            preparation=self.description,
        )
        write_manifest(self.folder, manifest)
        shutil.rmtree(self.work)
        return manifest


class _DigestLog:
    """The digests of all kept documents: a set to ask, and a file to make the set again from after a kill."""

    def __init__(self, work: Path, saved: int):
        self._set = DigestSet(work / "digests.table")
        self._file = open(work / "digests", "ab")  # noqa: SIM115
        self._file.truncate(saved * 16)
        logged = np.memmap(work / "digests", dtype="<u8", mode="r").reshape(-1, 2) if saved else np.empty((0, 2))
        for begin in range(0, saved, 1 << 16):
            self._set.add(np.array(logged[begin : begin + (1 << 16)], dtype=np.uint64))

    def add(self, digests: np.ndarray) -> np.ndarray:
        new = self._set.add(digests)
        self._file.write(np.ascontiguousarray(digests[new]).data)
        return new

    def save(self) -> int:
        """Make the log durable and return how many digests it holds."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._set.count


def read_journal(folder: Path) -> dict | None:
    """The journal of an interrupted preparation, if there is one."""
    path = folder / WORK_FOLDER / JOURNAL
    return json.loads(path.read_text()) if path.is_file() else None


def saved_tokenizer(folder: Path, journal: dict) -> Tokenizer:
    """The tokenizer that an interrupted preparation began with."""
    return Tokenizer.from_file(folder / FILE_NAME, journal["end_of_document"])


def start_over(folder: Path, tokenizer: Tokenizer) -> None:
    """Make room for a new corpus: an empty work folder, and the tokenizer in place."""
    shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)
    (folder / WORK_FOLDER).mkdir()
    publish(folder / FILE_NAME, tokenizer.backend.to_str(pretty=True).encode())


def remove_leftovers(folder: Path) -> None:
    """Drop the work folder of a corpus that was published a moment before its preparation was killed."""
    if (folder / MANIFEST).exists():
        shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)
