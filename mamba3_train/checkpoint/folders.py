"""Checkpoint folders: published whole or not at all, found, verified, deleted.

    step-00001000/
      shard-*.safetensors    this many as ranks wrote it; see sharded.py
      state.json             step, samples, rollbacks, world_size
      config.yaml            the resolved config
      manifest.json          library versions; size and SHA-256 of every file above

A checkpoint is written under a hidden name and renamed when its manifest is on the disk, and renamed to a hidden name
before it is deleted: what bears the name of a step is complete at every moment.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path

from mamba3_train.errors import UserError

MANIFEST, STATE, CONFIG = "manifest.json", "state.json", "config.yaml"
FORMAT = 1
_VERSIONED = ("mamba3-train", "torch", "triton", "lightning", "deepspeed", "numpy", "safetensors")

log = logging.getLogger(__name__)


def step_folder(checkpoints: Path, step: int) -> Path:
    """Folder of a step's checkpoint."""
    return checkpoints / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """Step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def unfinished(folder: Path) -> Path:
    """Where a checkpoint is written before it is published as `folder`."""
    return folder.with_name(f".{folder.name}.partial")


def begin(folder: Path) -> None:
    """Make the empty folder in which a checkpoint is written."""
    partial = unfinished(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def publish(folder: Path, shards: Mapping[str, dict], documents: Mapping[str, str]) -> None:
    """Complete what was written in `unfinished(folder)` and give it its name.

    Args:
        shards: `bytes` and `sha256` of every file that is there already, on the disk.
        documents: the other files' contents by name.
    """
    partial = unfinished(folder)
    files = dict(shards)
    for name, text in documents.items():
        files[name] = _write(partial / name, text)
    versions = {name: _version(name) for name in _VERSIONED} | {"python": platform.python_version()}
    _write(partial / MANIFEST, json.dumps({"format": FORMAT, "versions": versions, "files": files}, indent=1) + "\n")
    _to_disk(partial)
    _delete(folder)  # a damaged one of the same step, passed over when the run was resumed
    os.replace(partial, folder)
    _to_disk(folder.parent)


def published(checkpoints: Path) -> list[Path]:
    """All published checkpoints, oldest first."""
    return [path for path in _named(checkpoints) if (path / MANIFEST).exists()]


def _named(checkpoints: Path) -> list[Path]:
    """All that bear a step's name, oldest first; one without a manifest has lost it."""
    return sorted(path for path in checkpoints.glob("step-*") if path.name.removeprefix("step-").isdecimal())


def newest_whole(checkpoints: Path, before_step: int | None = None) -> Path | None:
    """The newest checkpoint, of any step or before one, whose files are as they were written; says which damaged ones
    it passed over.

    Raises:
        UserError: there are checkpoints and all are damaged: starting afresh would write over what is left of the run.
    """
    found = [path for path in _named(checkpoints) if before_step is None or step_of(path) < before_step]
    for folder in reversed(found):
        reason = complaint(folder)
        if reason is None:
            return folder
        log.warning("checkpoint %s is damaged (%s): trying the one before", folder, reason)
    if found:
        raise UserError(f"every checkpoint in {checkpoints} is damaged: restore one, or choose another run.name")
    return None


def complaint(folder: Path) -> str | None:
    """Why a checkpoint must not be used (a missing, unreadable, short or altered file), or None when it is whole."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return f"{MANIFEST} is missing or broken"
    for name, expected in files.items():
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        try:
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                    return f"{name} has changed since it was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def read_state(folder: Path) -> dict:
    """The JSON state of a checkpoint."""
    return json.loads((folder / STATE).read_text())


def prune(
    checkpoints: Path, saved: Path, keep_last: int, keep_every_n_steps: int = 0, way_back: int | None = None
) -> None:
    """Delete all but the newest `keep_last` checkpoints up to the one just saved, and every n-th step's (0: none).

    The newest one up to the step `way_back` stays, too. Those later than the one just saved are damaged, or the run
    would have gone on from them: they do not count, and are written again in time.
    """
    found = [path for path in published(checkpoints) if path.name <= saved.name]
    spared = [path for path in found if way_back is not None and step_of(path) <= way_back][-1:]
    for folder in found[:-keep_last]:
        if folder not in spared and (not keep_every_n_steps or step_of(folder) % keep_every_n_steps):
            _delete(folder)


def delete_after(checkpoints: Path, step: int) -> None:
    """Delete the checkpoints of later steps, the newest first; one that storage keeps is a warning."""
    for folder in reversed(published(checkpoints)):
        if step_of(folder) > step:
            try:
                _delete(folder)
            except OSError as error:
                log.warning("the checkpoint %s could not be deleted: %s", folder, error)


def remove_leftovers(checkpoints: Path) -> None:
    """Delete what a killed process left half written or half deleted."""
    for path in (*checkpoints.glob(".step-*.partial"), *checkpoints.glob(".step-*.deleted")):
        shutil.rmtree(path, ignore_errors=True)


def _delete(folder: Path) -> None:
    if not folder.exists():
        return
    hidden = folder.with_name(f".{folder.name}.deleted")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(folder, hidden)
    shutil.rmtree(hidden)


def _write(path: Path, text: str) -> dict:
    """Write a file to the disk; its entry in the manifest."""
    content = text.encode()
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _to_disk(folder: Path) -> None:
    """Wait until the names in a folder would survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
