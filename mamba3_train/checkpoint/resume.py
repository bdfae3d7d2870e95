"""Where a run goes on: the run folder, whether it may be used, and the newest whole checkpoint in it."""

import errno
import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TextIO

from omegaconf import DictConfig, OmegaConf

from mamba3_train.checkpoint import folders
from mamba3_train.errors import UserError

# What makes a run the run it is. The rest (steps, schedule, strategy, logging, …) may change between its parts.
IDENTITY = (
    *("model", "optimizer", "run.seed", "init_from"),
    *(f"data.{key}" for key in ("path", "seed", "packing", "mixture", "shuffle_shards")),
    *(f"data.{key}" for key in ("sequence_length", "global_batch_size")),
    *(f"data.{key}" for key in ("task", "shortest", "longest", "curriculum_steps")),
)

CORPUS, SUMMARY, LOCK = "corpus.json", "summary.json", ".lock"
"""In the run folder: a fingerprint of the corpus, the report, what the process that trains there holds."""

PATIENCE = 10
"""Seconds to wait for another process to leave the folder."""

_taken: dict[Path, TextIO] = {}

# Where slurm/submit.py leaves its script, the code and the logs, before the run begins.
SUBMISSION = "slurm"


def open_run_folder(
    config: DictConfig, documents: Mapping[str, str] = MappingProxyType({}), corpus: str | None = None
) -> Path | None:
    """Make config.run.dir ready and return the checkpoint to continue from, None for a new run.

    Once the folder is accepted, it is this process's until `leave_run_folder` or its end, and gets the resolved config
    as config.yaml, and the documents by their names.

    Args:
        config: of the run.
        documents: what else the folder holds of the run, contents by file name.
        corpus: fingerprint of the data, which must be what it was when the run began.

    Raises:
        UserError: the folder belongs to a run of another config or corpus, to one whose checkpoints are lost, or to
            another process, is in use and resume=never, or cannot be written.
    """
    folder = Path(config.run.dir)
    if corpus is not None:
        documents = {**documents, CORPUS: json.dumps({"sha256": corpus}) + "\n"}
    _check(folder, config, documents)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _take(folder)
        _check(folder, config, documents)  # what another process left that had it until now
        checkpoint = folders.newest_whole(folder / "checkpoints")
        folders.remove_leftovers(folder / "checkpoints")
        for name, text in {**documents, folders.CONFIG: OmegaConf.to_yaml(config, resolve=True)}.items():
            write_whole(folder / name, text)
    except OSError as error:
        raise UserError(f"the run folder {folder} cannot be written: {error}") from error
    return checkpoint


def _check(folder: Path, config: DictConfig, documents: Mapping[str, str]) -> None:
    """Refuse a folder in which this run may not go on, or begin; touches nothing."""
    saved = folder / folders.CONFIG
    if not folder.is_dir() or all(path.name in (SUBMISSION, LOCK) for path in folder.iterdir()):
        return
    if config.resume.name == "never":
        raise UserError(f"resume=never needs an empty folder, but {folder} is in use: choose another run.name")
    if not saved.exists():
        raise UserError(f"{folder} is not empty and holds no run: choose another run.name or run.dir")
    _refuse_another_run(folder, OmegaConf.load(saved), config)
    _refuse_other_data(folder, documents)
    _refuse_lost_checkpoints(folder)


def leave_run_folder() -> None:
    """Let other processes train in the folders that this one has opened."""
    while _taken:
        _taken.popitem()[1].close()


def _take(folder: Path) -> None:
    """Keep other processes out of a folder until this one leaves it or ends, however it does.

    A process that was just stopped or killed may take a moment to let go of it.
    """
    if folder.resolve() in _taken:
        return
    file = (folder / LOCK).open("a")
    for last in (*[False] * PATIENCE, True):
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                break  # a file system without locks
            if last:
                file.close()
                raise UserError(
                    f"another process is training in {folder}: wait for it, or choose another run.name"
                ) from error
            time.sleep(1.0)
    _taken[folder.resolve()] = file


def write_whole(path: Path, text: str) -> None:
    """Write a file unless it says so already; it is never there in part."""
    if path.exists() and path.read_text() == text:
        return
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def _refuse_another_run(folder: Path, before: DictConfig, now: DictConfig) -> None:
    resolved = OmegaConf.create(OmegaConf.to_container(now, resolve=True))
    changed = []
    for key in IDENTITY:
        old, new = flat(OmegaConf.select(before, key), key), flat(OmegaConf.select(resolved, key), key)
        changed += [
            f"{k} ({old.get(k)} there, {new.get(k)} now)" for k in sorted(old | new) if old.get(k) != new.get(k)
        ]
    if changed:
        raise UserError(
            f"{folder} holds a run of another config: {', '.join(changed)}; choose another run.name, or change it back"
        )


def _refuse_other_data(folder: Path, documents: Mapping[str, str]) -> None:
    known = folder / CORPUS
    if CORPUS in documents and known.exists() and known.read_text() != documents[CORPUS]:
        raise UserError(
            f"{folder} holds a run of another corpus than data.path has now ({known}): bring back the one that the run "
            "began with, or choose another run.name"
        )


def _refuse_lost_checkpoints(folder: Path) -> None:
    """Starting afresh would throw away the rows of a complete run; one that could not save has no other way."""
    summary = folder / SUMMARY
    if any((folder / "checkpoints").glob("step-*")) or not summary.exists():
        return
    if "not_saved" not in json.loads(summary.read_text()):
        raise UserError(
            f"{folder} holds a complete run without its checkpoints: bring {folder / 'checkpoints'} back, or choose "
            "another run.name"
        )


def flat(node, key: str) -> dict[str, object]:
    """Leaves of a config node by dotted key."""
    if not OmegaConf.is_config(node):
        return {key: node}
    items = node.items() if isinstance(node, DictConfig) else enumerate(node)
    return {k: v for name, child in items for k, v in flat(child, f"{key}.{name}").items()}
