"""From text to token shards: what `python -m mamba3_train.prepare` and a data module's first use do."""

import difflib
import errno
import os
import re
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from pathlib import Path

from rich.progress import Progress

from mamba3_train.data.corpus_files import MANIFEST
from mamba3_train.data.corpus_writer import (
    CorpusWriter,
    read_journal,
    remove_leftovers,
    saved_tokenizer,
    start_over,
)
from mamba3_train.data.folder_lock import locked
from mamba3_train.data.preparation_progress import preparation_progress
from mamba3_train.data.text_sources import TextSource
from mamba3_train.data.token_shards import Manifest, read_manifest
from mamba3_train.data.tokenizer import Tokenizer
from mamba3_train.data.tokenizing import TextBatch, TokenizingPool
from mamba3_train.errors import UserError

# Text that goes to a worker at a time: large beside the cost of sending it, small beside memory.
PIECE_CHARACTERS = 1 << 22

# The settings that decide what a corpus holds; the others only decide how fast it is made.
DECISIVE = ("sources", "tokenizer", "validation_fraction", "shard_tokens", "deduplicate")


@dataclass(frozen=True)
class TokenizerTraining:
    """Learn a byte-level BPE of `vocab_size` entries from about the first `max_bytes` of each source."""

    vocab_size: int | None = None
    max_bytes: int = 1 << 30


@dataclass(frozen=True)
class TokenizerChoice:
    """Exactly one of a hub `name`, a `file`, or `train`; `end_of_document` names the token that closes a document."""

    name: str | None = None
    file: str | None = None
    train: TokenizerTraining = field(default_factory=TokenizerTraining)
    end_of_document: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "train", _build(TokenizerTraining, self.train, "tokenizer.train"))
        given = [key for key in (self.name, self.file, self.train.vocab_size) if key is not None]
        if len(given) != 1:
            raise UserError(
                f"tokenizer.name={self.name}, tokenizer.file={self.file}, "
                f"tokenizer.train.vocab_size={self.train.vocab_size}: give exactly one of the three"
            )

    def get(self, sources: Mapping[str, TextSource]) -> Tokenizer:
        """Load the tokenizer, or train it on the sources."""
        if self.name is not None:
            return Tokenizer.from_hub(self.name, self.end_of_document)
        if self.file is not None:
            return Tokenizer.from_file(self.file, self.end_of_document)
        texts = chain.from_iterable(_first_bytes(s.documents(), self.train.max_bytes) for s in sources.values())
        return Tokenizer.train(texts, self.train.vocab_size, self.end_of_document)


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How a corpus is made: what to read, how to tokenize, how to store.

    Args:
        source: the text, when there is one source; `sources`: several, by name.
        tokenizer: which tokenizer; the fields of `TokenizerChoice`.
        validation_fraction: part of the documents, chosen by a hash of their text, that is held out for validation.
        shard_tokens: tokens in a shard, about.
        deduplicate: keep only the first of documents whose texts are equal.
        workers: processes that tokenize; None takes every core.
        checkpoint_seconds: an interrupted preparation loses at most this much work.
        automatic: a data module may make this corpus by itself when it is missing.

    Raises:
        UserError: an unknown key, or no source, or not exactly one tokenizer.
    """

    source: TextSource | Mapping | None = None
    sources: Mapping[str, TextSource | Mapping] = field(default_factory=dict)
    tokenizer: TokenizerChoice | Mapping = field(default_factory=dict)
    validation_fraction: float = 0.005
    shard_tokens: int = 1 << 27
    deduplicate: bool = True
    workers: int | None = None
    checkpoint_seconds: float = 30.0
    automatic: bool = False

    def __post_init__(self):
        single = self.source if isinstance(self.source, TextSource) else dict(self.source or {})
        given = {} if isinstance(single, dict) and single.get("path") is None else {"text": single}
        given |= dict(self.sources)
        if not given:
            raise UserError("no text to read: give source.path=PATH (a file, folder, glob, address or hub dataset)")
        for name in given:
            if not re.fullmatch(r"[\w.-]+", name):
                raise UserError(f"sources.{name}: a source's name is made of letters, digits, '_', '-' and '.'")
        sources = {
            name: _build(TextSource, source, "source" if single is source else f"sources.{name}")
            for name, source in given.items()
        }
        object.__setattr__(self, "source", None)
        object.__setattr__(self, "sources", sources)
        object.__setattr__(self, "tokenizer", _build(TokenizerChoice, self.tokenizer, "tokenizer"))
        for key, least in (("shard_tokens", 1), ("workers", 1), ("checkpoint_seconds", 0)):
            if (value := getattr(self, key)) is not None and value < least:
                raise UserError(f"{key}={value} must be at least {least}")
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f"validation_fraction={self.validation_fraction} must lie in [0, 1)")

    def description(self) -> dict:
        """Everything that decides the corpus, as plain values; equal descriptions mean equal corpora."""
        values = asdict(self)
        return {key: value for key, value in values.items() if key in DECISIVE}

    def command(self, output: str | Path) -> str:
        """The command line that makes this corpus."""
        arguments = {"output": str(output)}
        for name, source in self.sources.items():
            prefix = "source" if list(self.sources) == ["text"] else f"+sources.{name}"
            arguments |= {f"{prefix}.{key}": value for key, value in _changed(source).items()}
        for key, value in _changed(self.tokenizer).items():
            more = {f"train.{k}": v for k, v in _changed(value).items()} if key == "train" else {key: value}
            arguments |= {f"tokenizer.{k}": v for k, v in more.items()}
        arguments |= {k: v for k, v in _changed(self).items() if k in DECISIVE[2:]}
        return "python -m mamba3_train.prepare " + " ".join(shlex.quote(f"{k}={v}") for k, v in arguments.items())

    def run(self, output: str | Path) -> Manifest:
        """Make the corpus in the folder `output`, or go on with it; a finished one made the same way is left as it is.

        Raises:
            UserError: the folder holds another corpus, a source cannot be read or is empty, or the disk is full.
        """
        folder = Path(output)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder, f"prepares {folder}"):
                return self._run(folder)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"the disk is full: {folder} cannot be written to; free some space and run the same command again, "
                "it continues where it stopped"
            ) from error

    def _run(self, folder: Path) -> Manifest:
        if (folder / MANIFEST).exists():
            manifest = read_manifest(folder)
            self._check_same(folder, manifest.preparation)
            remove_leftovers(folder)
            return manifest
        journal = read_journal(folder)
        if journal is not None:
            self._check_same(folder, journal["description"])
            tokenizer = saved_tokenizer(folder, journal)
        else:
            tokenizer = self.tokenizer.get(self.sources)
            start_over(folder, tokenizer)
        writer = CorpusWriter(
            folder,
            tokenizer=tokenizer,
            sources=self.sources,
            description=self.description(),
            validation_fraction=self.validation_fraction,
            shard_tokens=self.shard_tokens,
            deduplicate=self.deduplicate,
        )
        workers = self.workers or len(os.sched_getaffinity(0))
        with TokenizingPool(tokenizer, writer.dtype, workers) as pool, preparation_progress() as progress:
            for name in self.sources:
                self._write_source(name, writer, pool, progress)
        return writer.publish()

    def _write_source(self, name: str, writer: CorpusWriter, pool: TokenizingPool, progress: Progress) -> None:
        source, done = self.sources[name], writer.progress[name]
        if done["finished"]:
            return
        position = done["position"]
        consumed = position["bytes"] if position else 0
        counts = {"documents": done["documents"], "tokens": writer.tokens(name)}
        begun = (*counts.values(), consumed)
        task = progress.add_task(name, total=source.size(), completed=consumed, begun=begun, **counts)
        saved = time.monotonic()
        for batch, tokens in pool.map(_batches(source.read(position), done["documents"])):
            writer.add(name, tokens)
            consumed += tokens.bytes
            position = batch.position or position
            progress.update(task, completed=consumed, documents=done["documents"], tokens=writer.tokens(name))
            if batch.position is not None and time.monotonic() - saved >= self.checkpoint_seconds:
                writer.checkpoint(name, batch.position)
                saved = time.monotonic()
        if not done["documents"]:
            raise UserError(f"source {name} ({source.path}) holds no text: the corpus would be empty")
        writer.checkpoint(name, position, finished=True)

    def _check_same(self, folder: Path, theirs: dict) -> None:
        mine = self.description()
        different = [key for key in mine if mine[key] != theirs.get(key)]
        if different:
            key = different[0]
            raise UserError(
                f"{folder} holds a corpus made with another {key} ({theirs.get(key)}, now {mine[key]}); "
                "choose another output folder or delete this one"
            )


def _build(cls: type, values, key: str):
    """Make a dataclass from a mapping of settings, naming the nearest key when one is unknown."""
    if isinstance(values, cls):
        return values
    known = [f.name for f in fields(cls)]
    for name in values:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1) or known
            raise UserError(f"unknown key {key}.{name}; nearest: {nearest[0]}")
    return cls(**values)


def _changed(settings) -> dict:
    """Fields of a dataclass that differ from their defaults."""
    defaults = {f.name: f.default for f in fields(settings)}
    return {name: value for name, default in defaults.items() if (value := getattr(settings, name)) != default}


def _batches(read: Iterable[tuple[list[str], dict]], number: int) -> Iterator[TextBatch]:
    """Cut what was read into pieces of a size worth a worker's turn; the last piece carries the position."""
    for texts, position in read:
        pieces, size = [[]], 0
        for text in texts:
            if size >= PIECE_CHARACTERS:
                pieces.append([])
                size = 0
            pieces[-1].append(text)
            size += len(text)
        for piece in pieces:
            yield TextBatch(piece, number, position if piece is pieces[-1] else None)
            number += len(piece)


def _first_bytes(documents: Iterator[str], limit: int) -> Iterator[str]:
    """Documents until `limit` bytes have been passed on."""
    consumed = 0
    for text in documents:
        if consumed >= limit:
            return
        consumed += len(text)
        yield text
