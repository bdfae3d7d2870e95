"""A signal ends a run between two steps, with a checkpoint."""

import signal

from lightning.pytorch import Callback, LightningModule, Trainer

from mamba3_train.training.callbacks.checkpointing import Checkpointing
from mamba3_train.training.processes import SharedFlag


class Preempted(Exception):
    """A signal stopped the run after a checkpoint, or after a failure to write one: the same command continues it."""

    def __init__(self, signal_number: int, step: int, failure: str | None):
        stopped = f"stopped by {signal.Signals(signal_number).name} after step {step}"
        super().__init__(f"{stopped}; {failure}" if failure else stopped)
        self.exit_code = 128 + signal_number


class Preemption(Callback):
    """On SIGINT (Ctrl-C) and SIGTERM to any rank: all finish the step, save, and leave by raising Preempted.

    A second signal of the same kind ends the process at once.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, checkpointing: Checkpointing):
        self.checkpointing = checkpointing
        self._received = 0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Take the signals over, after Lightning has set its own handlers."""
        self._flag = SharedFlag()
        for number in self.SIGNALS:
            signal.signal(number, self._receive)

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch, batch_idx: int) -> None:
        """Leave if a signal came during the step that is over."""
        received = self._flag.largest(self._received)
        if received:
            self.checkpointing.save(trainer, module)
            raise Preempted(received, trainer.global_step, self.checkpointing.failure)

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number in self.SIGNALS:
            if signal.getsignal(number) == self._receive:
                signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)

    def _receive(self, number: int, frame) -> None:
        self._received = number
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
