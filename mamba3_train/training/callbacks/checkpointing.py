"""Saving while training, and going on from what was saved.

A step is saved when the next one starts: then its validation is over and its rows are written, so that a checkpoint
holds the whole of the step.
"""

import importlib.metadata
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from mamba3_train.checkpoint import sharded

_VERSIONED = ("torch", "triton", "lightning", "mamba3-train")


class Checkpointing(Callback):
    """Saves every few steps and at the end; at the start loads what the run goes on from.

    Args:
        folder: where checkpoints lie.
        every_n_steps: steps between them.
        keep_last: how many stay.
        samples_per_step: rows of the global batch.
        config_yaml: the resolved config, stored with each.
        resume_from: checkpoint to load at the start, or None.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every_n_steps: int,
        keep_last: int,
        samples_per_step: int,
        config_yaml: str,
        resume_from: Path | None,
    ):
        self.folder, self.every_n_steps, self.keep_last = folder, every_n_steps, keep_last
        self.samples_per_step, self.config_yaml, self.resume_from = samples_per_step, config_yaml, resume_from
        # Not read off the disk: a damaged checkpoint of the same step, passed over at the start, must be written again.
        self._saved_step: int | None = None

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Load weights and optimizer, and tell Lightning's loops how many steps are done."""
        if self.resume_from is None:
            return
        state = sharded.load(self.resume_from, module.model, module.optimizers().optimizer)
        _count_steps_done(trainer, state["step"])
        self._saved_step = state["step"]

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch, batch_idx: int) -> None:
        """Save when the step that is over asks for it."""
        if trainer.global_step and trainer.global_step % self.every_n_steps == 0:
            self.save(trainer, module)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Save the last step."""
        self.save(trainer, module)

    def save(self, trainer: Trainer, module: LightningModule) -> None:
        """Save now, unless this step is saved already, and delete what is too old."""
        step = trainer.global_step
        if step == self._saved_step:
            return
        state = {
            "step": step,
            "samples": step * self.samples_per_step,
            "versions": {name: _version(name) for name in _VERSIONED},
        }
        folder = sharded.step_folder(self.folder, step)
        sharded.save(folder, module.model, module.optimizers().optimizer, state, self.config_yaml)
        self._saved_step = step
        if trainer.is_global_zero:
            sharded.keep_newest(self.folder, self.keep_last, folder)


def _count_steps_done(trainer: Trainer, step: int) -> None:
    """Set the counters behind trainer.global_step and the validation interval, as if `step` steps had been run."""
    epoch_loop = trainer.fit_loop.epoch_loop
    for progress in (epoch_loop.batch_progress.total, epoch_loop.manual_optimization.optim_step_progress.total):
        progress.ready = progress.completed = step
    epoch_loop.batch_progress.total.started = epoch_loop.batch_progress.total.processed = step
    epoch_loop._batches_that_stepped = step


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
