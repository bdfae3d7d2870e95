"""Saving while training, and going on from what was saved.

A step is saved when the next one starts: then its validation is over and its rows are written, so that a checkpoint
holds the whole of the step.
"""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from mamba3_train.checkpoint import folders, sharded
from mamba3_train.checkpoint.random_state import random_tensors, seed_generators, set_random_tensors
from mamba3_train.checkpoint.saver import SaveFailed, Saver
from mamba3_train.errors import UserError
from mamba3_train.training.data_cursor import DataCursor
from mamba3_train.training.processes import SharedFlag, cpu_group, decided_by_rank_zero
from mamba3_train.training.step_guard import StepGuard
from mamba3_train.training.strategies import load_checkpoint, tensors_to_save

log = logging.getLogger(__name__)


class Checkpointing(Callback):
    """Saves every few steps and at the end; at the start loads what the run goes on from.

    When storage fails, training goes on: the save is tried again after a sixteenth of the interval, then after twice
    as long each time, at most after a whole one.

    Args:
        folder: where checkpoints lie.
        every_n_steps: steps between them.
        keep_last: how many stay.
        keep_every_n_steps: steps whose checkpoints stay besides; 0 is none.
        asynchronous: train on while a checkpoint is written.
        cursor: where the data is; stored with each and taken over from the one that the run goes on from.
        config_yaml: the resolved config, stored with each.

    Set before training starts:
        resume_from: checkpoint to go on from, or None.
        before_waiting: called whenever training is about to wait for storage.

    Raises:
        UserError: a number below its least.
    """

    LAST_TRIES, SECONDS_BETWEEN = 3, 5.0

    def __init__(
        self,
        folder: Path,
        *,
        every_n_steps: int,
        keep_last: int,
        keep_every_n_steps: int,
        asynchronous: bool,
        cursor: DataCursor,
        config_yaml: str,
    ):
        for key, value, least in (
            ("every_n_steps", every_n_steps, 1),
            ("keep_last", keep_last, 1),
            ("keep_every_n_steps", keep_every_n_steps, 0),
        ):
            if value < least:
                raise UserError(f"checkpoint.{key}={value} must be at least {least}")
        self.folder, self.every_n_steps = folder, every_n_steps
        self.keep_last, self.keep_every_n_steps, self.asynchronous = keep_last, keep_every_n_steps, asynchronous
        self.cursor, self.config_yaml = cursor, config_yaml
        self.resume_from: Path | None = None
        self.before_waiting: Callable[[], None] = lambda: None
        self.failure: str | None = None
        """Why the newest step that was to be saved is not."""
        # Not read off the disk: a damaged checkpoint of the same step, passed over at the start, must be written again.
        self._saved_step: int | None = None
        self._writing_step: int | None = None
        self._retry_step: int | None = None
        self._failures = 0
        self._prepared = False
        self._random_state: dict[str, Tensor] | None = None

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Load weights, optimizer and random state, and tell Lightning's loops how many steps are done."""
        self._saver = Saver(
            self.folder,
            asynchronous=self.asynchronous,
            keep_last=self.keep_last,
            keep_every_n_steps=self.keep_every_n_steps,
            group=cpu_group(),
        )
        self._over = SharedFlag()
        if self.resume_from is None:
            seed_generators(module.seed, 0, trainer.global_rank)
            return
        state = self._load(self.resume_from, trainer, module)
        self.cursor.restore(state)
        _count_steps_done(trainer, state["step"])

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch, batch_idx: int) -> None:
        """Save when the step that is over asks for it."""
        if self._random_state is not None:
            # Here and not at the start: this is where it was when it was saved.
            set_random_tensors(self._random_state)
            self._random_state = None
        step = trainer.global_step
        if step and not self._prepared:
            self._saver.prepare(self._tensors(trainer, module))
            self._prepared = True
        due = step and step != self._saved_step and (step % self.every_n_steps == 0 or step == self._retry_step)
        # All ranks must learn of an outcome at the same step, or some would try again and some would not.
        if self._writing_step is not None and (due or not self._over.largest(int(not self._saver.finished))):
            self._retry_later(self._outcome(), step)
        if due:
            self._start(trainer, module)
            if not self.asynchronous:
                self._retry_later(self._outcome(), step)

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer) -> None:
        """Change nothing that is still being copied."""
        self._saver.wait_until_copied()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch, batch_idx: int) -> None:
        """See to it that the above was called.

        Raises:
            RuntimeError: it was not: the strategy's optimizer step is none that Lightning knows of.
        """
        if not self._saver.may_change:
            raise RuntimeError("the optimizer stepped while its state was copied: the checkpoint may mix two steps")

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Save the last step, trying a few times; `failure` says if that was in vain."""
        for attempt in range(self.LAST_TRIES):
            if attempt:
                time.sleep(self.SECONDS_BETWEEN)
            if self.save(trainer, module):
                return

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """Let a save that has begun come to its end, unless the person at the keyboard cannot wait."""
        if isinstance(exception, Exception):
            self._outcome()

    def save(self, trainer: Trainer, module: LightningModule) -> bool:
        """Save now and wait, unless this step is saved already; returns whether it is."""
        self._outcome()
        if trainer.global_step != self._saved_step:
            self._start(trainer, module)
            self._outcome()
        return trainer.global_step == self._saved_step

    @property
    def writing(self) -> bool:
        """Whether a save was begun whose outcome is not known."""
        return self._writing_step is not None

    def newest_before(self, step: int) -> Path | None:
        """The newest whole checkpoint of an earlier step, when nothing is being written any more."""
        self._outcome()
        self.before_waiting()
        return decided_by_rank_zero(lambda: folders.newest_whole(self.folder, before_step=step))

    def roll_back(self, trainer: Trainer, module: LightningModule, checkpoint: Path) -> int:
        """Take everything but the data back to a checkpoint, when a batch has begun; returns its step.

        Later checkpoints are deleted only then: a process killed before finds its way back here from any of them.
        """
        state = self._load(checkpoint, trainer, module)
        self.cursor.roll_back(trainer.global_step, state["step"])
        _count_steps_done(trainer, state["step"], batches_begun=1)
        self._retry_step, self._failures = None, 0
        decided_by_rank_zero(lambda: folders.delete_after(self.folder, state["step"]))
        return state["step"]

    def _load(self, checkpoint: Path, trainer: Trainer, module: LightningModule) -> dict:
        load_checkpoint(trainer.strategy, checkpoint, module.model, module.optimizers().optimizer)
        load_guard(checkpoint, module.guard)
        state = folders.read_state(checkpoint)
        self._load_random_state(checkpoint, state, trainer, module)
        self._saved_step = state["step"]
        return state

    def _start(self, trainer: Trainer, module: LightningModule) -> None:
        step = self._writing_step = trainer.global_step
        state = {"step": step, **self.cursor.state(step), "world_size": trainer.world_size}
        documents = {folders.STATE: json.dumps(state, indent=1) + "\n", folders.CONFIG: self.config_yaml}
        # Where a run may be rolled back, saves among skipped steps must not push out the last one from before them.
        way_back = step - module.guard.counts().skipped_in_a_row if module.guard.max_rollbacks else None
        self._saver.start(step, self._tensors(trainer, module), documents, way_back)

    def _tensors(self, trainer: Trainer, module: LightningModule) -> dict[str, Tensor]:
        training = tensors_to_save(trainer.strategy, module.model, module.optimizers().optimizer)
        return training | module.guard.tensors() | random_tensors(trainer.global_rank)

    def _outcome(self) -> bool:
        """Wait for the save that was begun, if one was; False, with a warning, if it failed."""
        if self._writing_step is None:
            return True
        step, self._writing_step = self._writing_step, None
        self.before_waiting()
        try:
            self._saver.wait()
        except SaveFailed as failed:
            newest = folders.published(self.folder)
            self.failure = f"step {step} is not saved: {failed}; the newest checkpoint is " + (
                str(newest[-1]) if newest else "none"
            )
            log.warning(self.failure)
            return False
        self._saved_step, self.failure = step, None
        seconds = self._saver.seconds_waited, self._saver.seconds_written
        log.debug("step %d is saved: training waited %.3f seconds of %.3f", step, *seconds)
        return True

    def _retry_later(self, saved: bool, step: int) -> None:
        if saved:
            self._retry_step, self._failures = None, 0
            return
        delay = min(max(self.every_n_steps // 16, 1) << self._failures, self.every_n_steps)
        self._retry_step, self._failures = step + delay, self._failures + 1
        log.warning("training goes on; the next try is at step %d at the latest", self._retry_step)

    def _load_random_state(self, checkpoint: Path, state: dict, trainer: Trainer, module: LightningModule) -> None:
        before, now = state.get("world_size"), trainer.world_size
        seed_generators(module.seed, state["step"], trainer.global_rank)
        if before == now:
            saved = sharded.shapes(checkpoint)
            wanted = random_tensors(trainer.global_rank)
            # A run that began without a GPU saved none of its generator's.
            self._random_state = {name: tensor for name, tensor in wanted.items() if name in saved}
            sharded.load(checkpoint, self._random_state)
            return
        # The saved draws have no counterpart: a rank has other rows now.
        log.info("random numbers start anew: %s processes saved, %d go on", before, now)


def load_guard(checkpoint: Path, guard: StepGuard) -> None:
    """Give a guard what it knew at a checkpoint; it begins anew where that was of another window, or is not there."""
    shapes = sharded.shapes(checkpoint)
    if all(shapes.get(name) == tensor.shape for name, tensor in guard.tensors().items()):
        sharded.load(checkpoint, guard.tensors())
    else:
        guard.forget()
        log.info("%s knows no losses of guards.spike_window: spikes are judged when there are new ones", checkpoint)


def _count_steps_done(trainer: Trainer, step: int, batches_begun: int = 0) -> None:
    """Set the counters behind trainer.global_step and the validation interval, as if `step` steps had been run.

    Args:
        batches_begun: 1 if called when a batch has begun, else 0.
    """
    epoch_loop = trainer.fit_loop.epoch_loop
    batches, steps = epoch_loop.batch_progress.total, epoch_loop.manual_optimization.optim_step_progress.total
    batches.ready = step + batches_begun
    batches.started = batches.processed = batches.completed = steps.ready = steps.completed = step
    epoch_loop._batches_that_stepped = step
