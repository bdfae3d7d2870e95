"""Where a run goes on: the run folder, whether it may be used, and the newest whole checkpoint in it."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

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

CORPUS = "corpus.json"
"""A fingerprint of the corpus, in the run folder."""

# Where slurm/submit.py leaves its script, the code and the logs, before the run begins.
SUBMISSION = "slurm"


def open_run_folder(config: DictConfig, documents: Mapping[str, str] = MappingProxyType({})) -> Path | None:
    """Make config.run.dir ready and return the checkpoint to continue from, None for a new run.

    Once the folder is accepted, writes the resolved config as config.yaml, and other documents by their names; the one
    named CORPUS must be what it was when the run began.

    Raises:
        UserError: the folder belongs to a run of another config or of other data, is in use and resume=never, or cannot
            be written.
    """
    folder = Path(config.run.dir)
    saved = folder / folders.CONFIG
    if folder.is_dir() and any(path.name != SUBMISSION for path in folder.iterdir()):
        if config.resume.name == "never":
            raise UserError(f"resume=never needs an empty folder, but {folder} is in use: choose another run.name")
        if not saved.exists():
            raise UserError(f"{folder} is not empty and holds no run: choose another run.name or run.dir")
        _refuse_another_run(folder, OmegaConf.load(saved), config)
        _refuse_other_data(folder, documents)
    checkpoint = folders.newest_whole(folder / "checkpoints")
    folders.remove_leftovers(folder / "checkpoints")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in {**documents, folders.CONFIG: OmegaConf.to_yaml(config, resolve=True)}.items():
            write_whole(folder / name, text)
    except OSError as error:
        raise UserError(f"the run folder {folder} cannot be written: {error}") from error
    return checkpoint


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


def flat(node, key: str) -> dict[str, object]:
    """Leaves of a config node by dotted key."""
    if not OmegaConf.is_config(node):
        return {key: node}
    items = node.items() if isinstance(node, DictConfig) else enumerate(node)
    return {k: v for name, child in items for k, v in flat(child, f"{key}.{name}").items()}
