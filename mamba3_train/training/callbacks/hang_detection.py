"""Ends a process that makes no progress, so that a lost rank does not hold the others."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from mamba3_train.training.processes import PATIENCE
from mamba3_train.training.watchdog import Watchdog


class HangDetection(Callback):
    """Allows a step, and what comes between two steps, so many seconds; three times as many what may take long.

    That is the first step and the first validation, which compile kernels, loading, and waiting for a save.

    Args:
        seconds: a step may take; 0 is no limit.
        folder: the run's, for the stacks of a process that hangs.
    """

    def __init__(self, seconds: float, folder: Path):
        self.seconds, self.folder = seconds, folder
        self._watchdog: Watchdog | None = None
        self._seen: set[str] = set()

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Begin to watch."""
        if self.seconds > 0:
            self._watchdog = Watchdog(self.folder / f"stacks-rank-{trainer.global_rank:05d}.txt")
            self._allow("getting ready", PATIENCE)

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch, batch_idx: int) -> None:
        """A step begins."""
        self._allow(f"taking step {trainer.global_step + 1}", self._patience("training"))

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch, batch_idx: int) -> None:
        """A step is over; the other ranks are met, and data is waited for."""
        self._allow(f"going on after step {trainer.global_step}")

    def on_validation_batch_start(
        self, trainer: Trainer, module: LightningModule, batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A step of validation begins."""
        self._allow(f"validating after step {trainer.global_step}", self._patience("validation"))

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Validation is over."""
        self._allow(f"going on after the validation of step {trainer.global_step}")

    def on_evaluation_pass(self) -> None:
        """A pass of an evaluation begins."""
        self._allow("evaluating", self._patience("evaluation"))

    def on_save_waited_for(self) -> None:
        """Training waits for a save."""
        self._allow("waiting for a checkpoint to be written", PATIENCE)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """The process ends, if the other ranks let it."""
        self._allow(f"ending after {type(exception).__name__}", PATIENCE)

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Watch no more."""
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watchdog = None

    def _patience(self, kind: str) -> int:
        first = kind not in self._seen
        self._seen.add(kind)
        return PATIENCE if first else 1

    def _allow(self, doing: str, times: int = 1) -> None:
        if self._watchdog is not None:
            self._watchdog.allow(times * self.seconds, doing)
