"""A logger that holds a run at a step until somebody asks it to stop, so that the request comes in the middle."""

import time

from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only

STEP = 7


class Waiting(DummyLogger):
    """Waits after step 7 of a run that began at step 1; one that goes on from a checkpoint is let through."""

    def __init__(self, folder: str, settings: dict):
        super().__init__()
        self._first = None

    @rank_zero_only
    def log_metrics(self, metrics, step=None):
        from mamba3_train.training.stop_signals import _active

        self._first = step if self._first is None else self._first
        while step == STEP and self._first == 1 and not _active[-1].received:
            time.sleep(0.1)
