"""Says which steps were skipped; ends a run that skips too many in a row, or rolls it back to before them."""

import logging

from lightning.pytorch import Callback, LightningModule, Trainer

from mamba3_train.checkpoint import folders
from mamba3_train.errors import UserError
from mamba3_train.training.callbacks.checkpointing import Checkpointing
from mamba3_train.training.callbacks.throughput import Throughput
from mamba3_train.training.metrics_file import MetricsFile
from mamba3_train.training.step_guard import Counts


class TooManySkips(UserError):
    """The same on every rank."""


log = logging.getLogger(__name__)


class Stability(Callback):
    """Looks at the module's guard in the steps that are logged, when the device was waited for anyway.

    After the guard's `max_spikes_in_a_row` the next step rolls the run back: weights, optimizer, random numbers and
    step count are those of the newest checkpoint from before the first skipped step, the data goes on where it is.

    Must come after Throughput and before Checkpointing.

    Args:
        every_n_steps: steps between rows.
        throughput: counts steps.
        checkpointing: loads, and knows the data's cursor.
    """

    def __init__(self, *, every_n_steps: int, throughput: Throughput, checkpointing: Checkpointing):
        self.every_n_steps, self.throughput, self.checkpointing = every_n_steps, throughput, checkpointing
        self._last: tuple[int, Counts] | None = None
        self._first_bad_step: int | None = None

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch, batch_idx: int) -> None:
        """Roll back if the last row asked for it."""
        if self._first_bad_step is not None:
            self._roll_back(trainer, module, self._first_bad_step)
            self._first_bad_step, self._last = None, None
        if self._last is None:
            self._last = trainer.global_step, module.guard.counts()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch, batch_idx: int) -> None:
        """Warn of steps that were skipped since the last row, and see whether there are too many in a row."""
        step = trainer.global_step
        if step % self.every_n_steps and step != trainer.max_steps:
            return
        (last_step, last), now = self._last, module.guard.counts()
        self._last = step, now
        if now.skipped > last.skipped and trainer.is_global_zero:
            log.warning(
                "skipped between step %d and step %d: %d with a loss or gradient that is not finite, %d with a spike "
                "of the loss; %d of the run so far",
                last_step, step, now.nonfinite - last.nonfinite, now.spikes - last.spikes, now.skipped,
            )  # fmt: skip
        guard = module.guard
        if now.nonfinite_in_a_row >= guard.max_nonfinite_in_a_row:
            raise TooManySkips(
                f"at step {step} the loss or its gradient has not been finite {now.nonfinite_in_a_row} times in a row "
                f"(guards.max_nonfinite_in_a_row={guard.max_nonfinite_in_a_row}); weights are as they were before. "
                f"{self._newest()}. Lower optimizer.lr or look at the data from sample "
                f"{self.checkpointing.cursor.samples(step - now.skipped_in_a_row):,} on"
            )
        if guard.max_rollbacks and now.spikes_in_a_row >= guard.max_spikes_in_a_row:
            self._first_bad_step = step - now.skipped_in_a_row + 1

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """Say what only this rank met, as a changed shard: the command lets rank 0 alone speak."""
        if isinstance(exception, UserError) and not isinstance(exception, TooManySkips) and not trainer.is_global_zero:
            log.error("rank %d: %s", trainer.global_rank, exception.line)

    def _roll_back(self, trainer: Trainer, module: LightningModule, first_bad_step: int) -> None:
        cursor, step, most = self.checkpointing.cursor, trainer.global_step, module.guard.max_rollbacks
        what = f"the loss has spiked since step {first_bad_step}"
        if cursor.rollbacks >= most:
            raise TooManySkips(
                f"{what}, and the run was rolled back {cursor.rollbacks} times already "
                f"(guards.max_rollbacks={most}). {self._newest()}. Lower optimizer.lr, or raise "
                "guards.spike_threshold if the data itself has become harder"
            )
        checkpoint = self.checkpointing.newest_before(first_bad_step)
        if checkpoint is None:
            raise TooManySkips(
                f"{what}, and there is no checkpoint from before to roll back to: save more often "
                f"(checkpoint.every_n_steps={self.checkpointing.every_n_steps})"
            )
        to_step = self.checkpointing.roll_back(trainer, module, checkpoint)
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.roll_back(to_step)
        self.throughput.count_from(to_step)
        if trainer.is_global_zero:
            log.warning(
                "%s: rolled back from step %d to step %d (%d of at most %d times); its data up to sample %s is passed "
                "over",
                what, step, to_step, cursor.rollbacks, most, f"{cursor.samples(to_step):,}",
            )  # fmt: skip

    def _newest(self) -> str:
        found = folders.published(self.checkpointing.folder)
        return f"the newest checkpoint is {found[-1]}" if found else "there is no checkpoint"
