"""Where text comes from: files, folders, remote objects and hub datasets, read as a stream through `datasets`."""

import glob
import hashlib
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mamba3_train.errors import UserError

PYTHON_STDLIB = "python_stdlib"

# File endings (before any compression ending) and the `datasets` builder that reads them.
BUILDERS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".arrow": "arrow",
}
COMPRESSIONS = {".gz", ".zst", ".bz2", ".xz", ".lz4"}


@dataclass(frozen=True)
class TextSource:
    """One corpus of documents.

    Args:
        path: a file, a folder, a glob, a remote address (s3://, gs://, https://, …), a dataset of the Hugging Face hub,
            or "python_stdlib": the sources of the running interpreter's own standard library.
        name: the hub dataset's configuration.
        split: the hub dataset's split.
        text: the field that holds the text.
        max_bytes: read about this much text (UTF-8 bytes) and stop; None reads everything.
    """

    path: str
    name: str | None = None
    split: str = "train"
    text: str = "text"
    max_bytes: int | None = None

    def documents(self) -> Iterator[str]:
        """Every document's text, in an order that never changes; empty ones are left out.

        Raises:
            UserError: nothing is at `path`, or its rows have no field `text`.
        """
        consumed = 0
        for text in _standard_library() if self.path == PYTHON_STDLIB else self._rows():
            if self.max_bytes is not None and consumed >= self.max_bytes:
                return
            if text:
                consumed += len(text.encode(errors="replace"))
                yield text

    def _rows(self) -> Iterator[str]:
        from datasets import load_dataset  # a second of import that the training process does not need

        try:
            dataset = load_dataset(streaming=True, **self._load_arguments())
            rows: Iterable[dict] = iter(dataset)
            first = next(rows, None)
        except UserError:
            raise
        except Exception as error:  # builders, file systems and the hub each raise their own kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"source.path={self.path} cannot be read: {reason}") from error
        if first is None:
            return
        if self.text not in first:
            fields = ", ".join(first)
            raise UserError(f"source.text={self.text}: {self.path} has no such field; its fields are: {fields}")
        yield first[self.text]
        for row in rows:
            yield row[self.text]

    def _load_arguments(self) -> dict:
        remote = "://" in self.path
        files = [self.path] if remote else _local_files(self.path)
        if files:
            builder = _builder(files, self.path)
            arguments = {"path": builder, "data_files": files, "split": "train"}
            return arguments | ({"sample_by": "document"} if builder == "text" else {})
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


def _builder(files: list[str], path: str) -> str:
    builders = set()
    for file in files:
        suffixes = [s for s in Path(file.split("?")[0]).suffixes if s not in COMPRESSIONS]
        builders.add(BUILDERS.get(suffixes[-1] if suffixes else "", "text"))
    if len(builders) > 1:
        kinds = ", ".join(sorted(builders))
        raise UserError(
            f"source.path={path} mixes kinds of files ({kinds}); choose one by a glob such as '{path}/*.jsonl'"
        )
    return builders.pop()


def _standard_library() -> Iterator[str]:
    """Sources of the standard library without its tests, in an order by hash so that any prefix is a fair sample."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    relative = [p.relative_to(root) for p in root.rglob("*.py")]
    kept = [p.as_posix() for p in relative if not left_out & set(p.parts)]
    for name in sorted(kept, key=lambda name: hashlib.sha256(name.encode()).digest()):
        yield (root / name).read_text(encoding="utf-8", errors="replace")
