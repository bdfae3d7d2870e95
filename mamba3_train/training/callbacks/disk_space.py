"""Says that a disk will be full before it is."""

import json
import logging
import shutil
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from mamba3_train.checkpoint import folders
from mamba3_train.training.callbacks.checkpointing import Checkpointing

log = logging.getLogger(__name__)
GIB = 2**30


class DiskSpace(Callback):
    """Compares free space with what checkpoints will take, at the start and in the steps that are logged.

    Each of two warnings is given once, and again only when there was room in between: that the disk has no room for
    all that are to be kept and the one being written, and that it has none for the next.

    Args:
        every_n_steps: steps between rows.
        bytes_expected: of a checkpoint, until there is one.
        checkpointing: where checkpoints lie, and how many stay.
    """

    def __init__(self, *, every_n_steps: int, bytes_expected: int, checkpointing: Checkpointing):
        self.every_n_steps, self.bytes_expected, self.checkpointing = every_n_steps, bytes_expected, checkpointing
        self._said: set[str] = set()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Compare before the first step."""
        if trainer.is_global_zero:
            self.compare()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch, batch_idx: int) -> None:
        """Compare when a row is logged, unless a checkpoint is half there."""
        if trainer.is_global_zero and trainer.global_step % self.every_n_steps == 0 and not self.checkpointing.writing:
            self.compare()

    def compare(self) -> None:
        """Warn if there is less room than will be needed."""
        kept, folder = self.checkpointing, self.checkpointing.folder
        try:
            found = folders.published(folder)
            size = _bytes(found[-1]) if found else self.bytes_expected
            free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
        except (OSError, ValueError):
            return  # storage that cannot be asked cannot be warned of
        # The newest is written before the oldest is deleted; of those that stay for good there is always one to come.
        to_come = max(kept.keep_last + 1 - len(found), 1) + bool(kept.keep_every_n_steps)
        have = f"the disk of {folder} has {free / GIB:.2f} GiB free"
        self._say_once("next", free < size, f"{have}, less than the {size / GIB:.2f} GiB of the next checkpoint")
        self._say_once(
            "all",
            free < to_come * size,
            f"{have}, checkpoints will need {to_come * size / GIB:.2f} GiB more ({to_come} of {size / GIB:.2f}): make "
            "room, or lower checkpoint.keep_last",
        )

    def _say_once(self, threshold: str, reached: bool, message: str) -> None:
        if reached and threshold not in self._said:
            log.warning(message)
        (self._said.add if reached else self._said.discard)(threshold)


def _bytes(checkpoint: Path) -> int:
    """Size of a checkpoint by its manifest."""
    files = json.loads((checkpoint / folders.MANIFEST).read_text())["files"]
    return sum(file["bytes"] for file in files.values())
