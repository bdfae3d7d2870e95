"""From text to token shards: what `python -m mamba3_train.prepare` and a data module's first use do."""

import difflib
import fcntl
import hashlib
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from itertools import chain, islice
from pathlib import Path

import numpy as np
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from mamba3_train.data.text_sources import TextSource
from mamba3_train.data.token_shards import MANIFEST, Manifest, ShardWriter, read_manifest, token_dtype, write_manifest
from mamba3_train.data.tokenizer import FILE_NAME, Tokenizer
from mamba3_train.errors import UserError

BATCH_DOCUMENTS = 256


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
        automatic: a data module may make this corpus by itself when it is missing.

    Raises:
        UserError: an unknown key, or no source, or not exactly one tokenizer.
    """

    source: TextSource | Mapping | None = None
    sources: Mapping[str, TextSource | Mapping] = field(default_factory=dict)
    tokenizer: TokenizerChoice | Mapping = field(default_factory=dict)
    validation_fraction: float = 0.005
    shard_tokens: int = 1 << 27
    automatic: bool = False

    def __post_init__(self):
        single = self.source if isinstance(self.source, TextSource) else dict(self.source or {})
        given = {} if isinstance(single, dict) and single.get("path") is None else {"text": single}
        given |= dict(self.sources)
        if not given:
            raise UserError("no text to read: give source.path=PATH (a file, folder, glob, address or hub dataset)")
        sources = {name: _build(TextSource, source, f"sources.{name}") for name, source in given.items()}
        object.__setattr__(self, "source", None)
        object.__setattr__(self, "sources", sources)
        object.__setattr__(self, "tokenizer", _build(TokenizerChoice, self.tokenizer, "tokenizer"))
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f"validation_fraction={self.validation_fraction} must lie in [0, 1)")

    def description(self) -> dict:
        """Everything that decides the corpus, as plain values; equal descriptions mean equal corpora."""
        values = asdict(self)
        del values["automatic"], values["source"]
        return values

    def command(self, output: str | Path) -> str:
        """The command line that makes this corpus."""
        arguments = {"output": str(output)}
        for name, source in self.sources.items():
            prefix = "source" if list(self.sources) == ["text"] else f"+sources.{name}"
            arguments |= {f"{prefix}.{key}": value for key, value in _changed(source).items()}
        for key, value in _changed(self.tokenizer).items():
            more = {f"train.{k}": v for k, v in _changed(value).items()} if key == "train" else {key: value}
            arguments |= {f"tokenizer.{k}": v for k, v in more.items()}
        arguments |= {k: v for k, v in _changed(self).items() if k in ("validation_fraction", "shard_tokens")}
        return "python -m mamba3_train.prepare " + " ".join(shlex.quote(f"{k}={v}") for k, v in arguments.items())

    def run(self, output: str | Path) -> Manifest:
        """Make the corpus in the folder `output`; a finished one made the same way is left as it is.

        Raises:
            UserError: the folder holds another corpus, or a source yields no document.
        """
        folder = Path(output)
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            if (folder / MANIFEST).exists():
                return self._existing(folder)
            tokenizer = self.tokenizer.get(self.sources)
            tokenizer.save(folder / FILE_NAME)
            splits = self._write_shards(folder, tokenizer)
            manifest = Manifest(
                dtype=token_dtype(tokenizer.vocab_size).name,
                vocab_size=tokenizer.vocab_size,
                end_of_document_id=tokenizer.end_of_document_id,
                tokenizer_fingerprint=tokenizer.fingerprint,
                splits=splits,
                preparation=self.description(),
            )
            write_manifest(folder, manifest)
        return manifest

    def _existing(self, folder: Path) -> Manifest:
        manifest = read_manifest(folder)
        mine, theirs = self.description(), manifest.preparation
        different = [key for key in mine if mine[key] != theirs.get(key)]
        if different:
            key = different[0]
            raise UserError(
                f"{folder} holds a corpus made with another {key} ({theirs.get(key)}, now {mine[key]}); "
                "choose another output folder or delete this one"
            )
        return manifest

    def _write_shards(self, folder: Path, tokenizer: Tokenizer) -> dict[str, tuple]:
        dtype = token_dtype(tokenizer.vocab_size)
        splits: dict[str, list] = {"train": [], "validation": []}
        with _progress() as progress:
            for name, source in self.sources.items():
                task = progress.add_task(name, documents=0, tokens=0)
                writers = {split: ShardWriter(folder, name, split, dtype, self.shard_tokens) for split in splits}
                documents = tokens = 0
                for texts in _batches(source.documents(), BATCH_DOCUMENTS):
                    ids = tokenizer.encode_documents(texts)
                    held_out = np.array([_fraction(text) < self.validation_fraction for text in texts])
                    for split, chosen in (("train", ~held_out), ("validation", held_out)):
                        kept = [ids[i] for i in np.flatnonzero(chosen)]
                        if kept:
                            lengths = np.array([len(document) for document in kept])
                            writers[split].add(np.fromiter(chain.from_iterable(kept), dtype), lengths)
                    documents += len(texts)
                    tokens += sum(map(len, ids))
                    progress.update(task, documents=documents, tokens=tokens)
                if not documents:
                    raise UserError(f"source {name} ({source.path}) holds no text: the corpus would be empty")
                for split, writer in writers.items():
                    writer.close()
                    splits[split] += writer.shards
        return {split: tuple(shards) for split, shards in splits.items()}


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


def _fraction(text: str) -> float:
    """Place of a document in [0, 1), by its text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest()) / 2**64


def _batches(documents: Iterator[str], size: int) -> Iterator[list[str]]:
    documents = iter(documents)
    while batch := list(islice(documents, size)):
        yield batch


def _first_bytes(documents: Iterator[str], limit: int) -> Iterator[str]:
    """Documents until `limit` bytes have been passed on."""
    consumed = 0
    for text in documents:
        if consumed >= limit:
            return
        consumed += len(text)
        yield text


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time prepare a folder; the lock goes with the process, however it ends."""
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("tokenizing {task.description}"),
        TextColumn("{task.fields[documents]:,} documents, {task.fields[tokens]:,} tokens"),
        TimeElapsedColumn(),
    )
