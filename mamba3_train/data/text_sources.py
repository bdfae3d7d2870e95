"""Where text comes from: files, folders, remote objects and hub datasets, read as a stream through `datasets`."""

import glob
import hashlib
import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mamba3_train.errors import UserError

PYTHON_STDLIB = "python_stdlib"

# File endings (before any compression ending) and the `datasets` builder that reads them; all others are plain text.
BUILDERS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".arrow": "arrow",
}
COMPRESSIONS = {".gz", ".zst", ".bz2", ".xz", ".lz4"}

ROWS_A_BATCH = 256


@dataclass(frozen=True)
class TextSource:
    """One corpus of documents.

    Args:
        path: a file, a folder, a glob, a remote address (s3://, gs://, https://, …), a dataset of the Hugging Face hub,
            or "python_stdlib": the sources of the running interpreter's own standard library.
        name: the hub dataset's configuration.
        split: the hub dataset's split.
        text: the field that holds the text.
        min_characters, max_characters: leave out documents that are shorter or longer.
        max_bytes: read about this much text (UTF-8 bytes) and stop; None reads everything.
    """

    path: str
    name: str | None = None
    split: str = "train"
    text: str = "text"
    min_characters: int = 1
    max_characters: int | None = None
    max_bytes: int | None = None

    def documents(self) -> Iterator[str]:
        """Every document's text, in an order that never changes."""
        for texts, _ in self.read():
            yield from texts

    def read(self, position: dict | None = None) -> Iterator[tuple[list[str], dict]]:
        """Read batches of documents, each with the position behind it: plain values from which to read on.

        Raises:
            UserError: nothing is at `path`, its rows have no such field, or reading fails half way.
        """
        position = position or {"bytes": 0, "rows": None}
        consumed = position["bytes"]
        rows = _standard_library(position["rows"]) if self.path == PYTHON_STDLIB else self._rows(position["rows"])
        for texts, place in rows:
            kept = []
            for text in texts:
                if self.max_bytes is not None and consumed >= self.max_bytes:
                    break
                if text and self.min_characters <= len(text) <= (self.max_characters or len(text)):
                    consumed += len(text.encode(errors="replace"))
                    kept.append(text)
            yield kept, {"bytes": consumed, "rows": place}
            if self.max_bytes is not None and consumed >= self.max_bytes:
                return

    def size(self) -> int | None:
        """Bytes of text to expect, about; None where only reading it all would tell."""
        if self.path == PYTHON_STDLIB:
            size = sum(path.stat().st_size for path in _standard_library_files())
        else:
            files = [] if "://" in self.path else _local_files(self.path)
            known = files and all(_kind(file) in ("text", "json") and not _compressed(file) for file in files)
            size = sum(Path(file).stat().st_size for file in files) if known else None
        limits = [value for value in (size, self.max_bytes) if value is not None]
        return min(limits, default=None)

    def _rows(self, state: dict | None) -> Iterator[tuple[list[str], dict]]:
        from datasets import load_dataset  # a second of import that the training process does not need

        from mamba3_train.data import compressed_objects

        compressed_objects.register()
        try:
            arguments = self._load_arguments()
            dataset = load_dataset(streaming=True, **arguments).with_format("arrow")
            if state is not None:
                dataset.load_state_dict(state)
            # A plain text file is one document of any size; rows of tables are small.
            for table in dataset.iter(1 if arguments["path"] == "text" else ROWS_A_BATCH):
                if self.text not in table.column_names:
                    fields = ", ".join(table.column_names)
                    raise UserError(f"source.text={self.text}: {self.path} has no such field; its fields are: {fields}")
                yield table.column(self.text).cast("string").to_pylist(), dataset.state_dict()
        except UserError:
            raise
        except Exception as error:  # builders, file systems and the hub each raise their own kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if isinstance(error, StopIteration | RuntimeError) and "StopIteration" in repr(error):
                reason = "it is empty"
            elif isinstance(error, UnicodeDecodeError) and (file := self._not_text()):
                reason = f"{file} is no text in UTF-8; leave it out by a glob, as source.path='{self.path}/**/*.txt'"
            raise UserError(f"source.path={self.path} cannot be read: {reason}") from error

    def _not_text(self) -> str | None:
        """The first local file that is not UTF-8."""
        for file in [] if "://" in self.path else _local_files(self.path):
            try:
                with open(file, encoding="utf-8") as text:
                    while text.read(1 << 20):
                        pass
            except UnicodeDecodeError:
                return file
        return None

    def _load_arguments(self) -> dict:
        files = [self.path] if "://" in self.path else _local_files(self.path)
        if files:
            kinds = sorted({_kind(file) for file in files})
            if len(kinds) > 1:
                raise UserError(
                    f"source.path={self.path} mixes kinds of files ({', '.join(kinds)}); "
                    f"choose one by a glob such as '{self.path}/*.jsonl'"
                )
            arguments = {"path": kinds[0], "data_files": files, "split": "train"}
            return arguments | ({"sample_by": "document"} if kinds == ["text"] else {})
        if re.fullmatch(r"[\w.-]+/[\w.-]+", self.path):
            return {"path": self.path, "name": self.name, "split": self.split}
        raise UserError(
            f"source.path={self.path}: no such file or folder, and not the name of a hub dataset (owner/name)"
        )


def _local_files(path: str) -> list[str]:
    """Regular files at a path or glob, sorted; hidden ones left out; empty when there is nothing there."""
    if Path(path).is_file():
        return [path]
    if Path(path).is_dir():
        candidates = [p for p in Path(path).rglob("*") if not _hidden(p.relative_to(path))]
    else:
        candidates = [Path(p) for p in glob.glob(path, recursive=True)]
    files = sorted(str(p) for p in candidates if p.is_file())
    if Path(path).is_dir() and not files:
        raise UserError(f"source.path={path}: the folder holds no file")
    return files


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in relative.parts)


def _compressed(file: str) -> bool:
    return Path(file).suffix in COMPRESSIONS


def _kind(file: str) -> str:
    """The `datasets` builder that reads a file."""
    suffixes = [suffix for suffix in Path(file.split("?")[0]).suffixes if suffix not in COMPRESSIONS]
    return BUILDERS.get(suffixes[-1] if suffixes else "", "text")


def _standard_library_files() -> list[Path]:
    """Sources of the standard library without its tests, in an order by hash so that any prefix is a fair sample."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in left_out]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found, key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest())


def _standard_library(state: dict | None) -> Iterator[tuple[list[str], dict]]:
    files = _standard_library_files()
    first = state["files"] if state else 0
    for begin in range(first, len(files), 16):
        batch = files[begin : begin + 16]
        yield (
            [path.read_text(encoding="utf-8", errors="replace") for path in batch],
            {"files": begin + len(batch)},
        )
