"""A run that is asked to stop ends between two steps, with a checkpoint, and goes on from there another time."""

import signal
import time

from lightning.pytorch import Callback, LightningModule, Trainer

from mamba3_train.training.callbacks.checkpointing import Checkpointing
from mamba3_train.training.processes import SharedFlag
from mamba3_train.training.stop_signals import STOPPED, StopSignals, exit_code

TIME_IS_UP = 128  # beside the numbers of signals, which are smaller


class Preempted(Exception):
    """The run was asked to stop, and did after a checkpoint, or after a failure to write one."""

    def __init__(self, reason: int, step: int, failure: str | None):
        by = "at its time limit" if reason == TIME_IS_UP else f"by {signal.Signals(reason).name}"
        stopped = f"stopped {by} after step {step}"
        super().__init__(f"{stopped}; {failure}" if failure else stopped)
        self.exit_code = STOPPED if reason == TIME_IS_UP else exit_code(reason)


class Preemption(Callback):
    """On a signal to any rank, or when time is up: all finish the step, save, and leave by raising Preempted.

    A validation is left between two of its batches, and made up for when the run goes on. Until the first step is over
    there is nothing to save; should that take longer than `FIRST_STEP` seconds (kernels compile), a process leaves by
    itself.

    Args:
        checkpointing: saves.
        stop: the signals.
        stop_at: when time is up, in seconds of the epoch; None is never.

    Set before training starts:
        validate_first: the step that the run goes on from has its validation still to come.
    """

    FIRST_STEP = 10.0

    def __init__(self, checkpointing: Checkpointing, stop: StopSignals, stop_at: float | None = None):
        self.checkpointing, self.stop, self.stop_at = checkpointing, stop, stop_at
        self.validate_first = False

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """From here on ranks stop together. Must come after the callback that counts the steps done."""
        self._flag = SharedFlag()
        self.stop.leave_after = self.FIRST_STEP
        if self.validate_first:
            # As Lightning's own loop does between two steps.
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch, batch_idx: int) -> None:
        """Leave if that was asked for during the step that is over."""
        self._leave_if_asked(trainer, module)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch, batch_idx: int) -> None:
        """Now there is something to save."""
        self.stop.leave_after = None

    def on_validation_batch_start(
        self, trainer: Trainer, module: LightningModule, batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A validation may take longer than a scheduler waits."""
        if trainer.state.fn == "fit":
            self._leave_if_asked(trainer, module)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """The last step is saved; what is left, the report, is made again when it was interrupted."""
        self._leave_if_asked(trainer, module)
        self.stop.leave_after = 0.0

    def _leave_if_asked(self, trainer: Trainer, module: LightningModule) -> None:
        late = self.stop_at is not None and time.time() >= self.stop_at
        reason = self._flag.largest(TIME_IS_UP if late else self.stop.received)
        if not reason:
            return
        self.stop.leave_after = None
        if trainer.global_step:
            self.checkpointing.save(trainer, module)
        raise Preempted(reason, trainer.global_step, self.checkpointing.failure)
