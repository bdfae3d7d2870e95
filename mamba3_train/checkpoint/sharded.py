"""One folder a checkpoint: tensors in safetensors by parameter name, published whole or not at all.

    step-00001000/
      *.safetensors    model.<name>, optimizer.<name>.<state>, written by torch.distributed.checkpoint
      state.json       step, samples, tokens, versions
      config.yaml      the resolved config
      manifest.json    size and SHA-256 of every file above

A checkpoint is written under a temporary name and renamed when its manifest is on the disk, so what bears the name of
a step is complete.
"""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_model_state_dict, set_state_dict

from mamba3_train.errors import UserError

MANIFEST, STATE, CONFIG = "manifest.json", "state.json", "config.yaml"

log = logging.getLogger(__name__)


def step_folder(checkpoints: Path, step: int) -> Path:
    """Folder of a step's checkpoint."""
    return checkpoints / f"step-{step:08d}"


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict, config_yaml: str) -> None:
    """Write a checkpoint and publish it under `folder`.

    Args:
        state: JSON values: at least `step`.
        config_yaml: the resolved config.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    together = dist.is_initialized()
    first = not together or dist.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    if together:
        dist.barrier()
    writer = dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True)
    dcp.save(_tensors(model, optimizer), storage_writer=writer, no_dist=not together)
    if first:
        _publish(partial, folder, state, config_yaml)
    if together:
        dist.barrier()


def _publish(partial: Path, folder: Path, state: dict, config_yaml: str) -> None:
    """Complete what the ranks wrote, hash it, and give it its name."""
    (partial / CONFIG).write_text(config_yaml)
    (partial / STATE).write_text(json.dumps(state, indent=1) + "\n")
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(partial.iterdir())}
    (partial / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n")
    for path in (*partial.iterdir(), partial):
        _to_disk(path)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    _to_disk(folder.parent)


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict:
    """Fill a model, and an optimizer, from a checkpoint; returns its state.

    Raises:
        UserError: the checkpoint lacks a parameter, or has it in another shape.
    """
    tensors = _tensors(model, optimizer)
    try:
        reader = dcp.HuggingFaceStorageReader(str(folder))
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except (dcp.CheckpointException, RuntimeError, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"the checkpoint {folder} does not fit this model: {reason}") from error
    model_state = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    if optimizer is None:
        set_model_state_dict(model, model_state)
    else:
        _, optimizer_state = get_state_dict(model, optimizer)
        for name, states in optimizer_state["state"].items():
            for key in states:
                states[key] = tensors[f"optimizer.{name}.{key}"]
        set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    return read_state(folder)


def read_state(folder: Path) -> dict:
    """The JSON state of a checkpoint."""
    return json.loads((folder / STATE).read_text())


def complaint(folder: Path) -> str | None:
    """Why a checkpoint must not be used (a missing, short or altered file), or None when it is whole."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return f"{MANIFEST} is missing or broken"
    for name, expected in files.items():
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if _sha256(path) != expected["sha256"]:
            return f"{name} has changed since it was written"
    return None


def published(checkpoints: Path) -> list[Path]:
    """All published checkpoints, oldest first."""
    return sorted(path for path in checkpoints.glob("step-*") if (path / MANIFEST).exists())


def newest_whole(checkpoints: Path) -> Path | None:
    """The newest checkpoint whose files are as they were written; says which damaged ones it passed over.

    Raises:
        UserError: there are checkpoints and all are damaged: starting afresh would write over what is left of the run.
    """
    found = published(checkpoints)
    for folder in reversed(found):
        reason = complaint(folder)
        if reason is None:
            return folder
        log.warning("checkpoint %s is damaged (%s): trying the one before", folder, reason)
    if found:
        raise UserError(f"every checkpoint in {checkpoints} is damaged: restore one, or choose another run.name")
    return None


def keep_newest(checkpoints: Path, count: int, saved: Path) -> None:
    """Delete all but the newest `count` checkpoints up to the one just saved.

    Later ones are damaged, or the run would have gone on from them: they do not count, and are written again in time.
    """
    for folder in [path for path in published(checkpoints) if path.name <= saved.name][:-count]:
        # Without its manifest a half-deleted folder is no checkpoint.
        (folder / MANIFEST).unlink()
        shutil.rmtree(folder)


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """All tensors by the names they have in a checkpoint; an optimizer that has not stepped yet gets its state."""
    if optimizer is None:
        return {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    model_state, optimizer_state = get_state_dict(model, optimizer)
    tensors = {f"model.{name}": tensor for name, tensor in model_state.items()}
    for name, states in optimizer_state["state"].items():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in states.items()}
    return tensors


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
