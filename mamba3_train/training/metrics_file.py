"""metrics.jsonl: one JSON object a logged step, readable with any tool."""

import errno
import json
import logging
import os
from pathlib import Path

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from mamba3_train.errors import UserError
from mamba3_train.evaluation.metrics import read_metrics

log = logging.getLogger(__name__)


class MetricsFile(Logger):
    """Lightning logger that appends rows to a file; rows that storage refuses wait in memory and are tried again.

    Args:
        path: the file.
        from_step: rows after this step are dropped at the start: a resumed run writes them again.

    Raises:
        UserError: storage refuses that.
    """

    def __init__(self, path: Path, from_step: int = 0):
        super().__init__()
        self.path = path
        self._waiting: list[str] = []
        try:
            self._drop_rows_after(from_step)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}; free some space, or repair it") from error

    @property
    def name(self) -> str:
        """Lightning's name of this logger."""
        return "metrics"

    @property
    def version(self) -> str:
        """There is one version: the file."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one row; a row holds what is in `metrics`."""
        self._waiting.append(json.dumps(metrics) + "\n")
        try:
            self._append()
        except OSError as error:
            if len(self._waiting) == 1:
                log.warning("%s cannot be written (%s): its rows wait in memory", self.path, error.strerror)

    def _append(self) -> None:
        with self.path.open("ab", buffering=0) as file:
            begin = file.tell()
            content = "".join(self._waiting).encode()
            try:
                if file.write(content) != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(begin)
                raise
        self._waiting.clear()

    @rank_zero_only
    def log_hyperparams(self, *args, **kwargs) -> None:
        """Nothing: config.yaml holds them."""

    @rank_zero_only
    def roll_back(self, step: int) -> None:
        """Drop the rows after a step, which come again; a refusal of storage leaves them where they are."""
        self._waiting = [line for line in self._waiting if json.loads(line)["step"] <= step]
        try:
            self._drop_rows_after(step)
        except OSError as error:
            log.warning("rows after step %d stay in %s (%s)", step, self.path, error.strerror)

    @rank_zero_only
    def _drop_rows_after(self, step: int) -> None:
        if not self.path.exists():
            return
        rows = read_metrics(self.path)
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))
        os.replace(partial, self.path)


def validation_missing(path: Path, step: int, every_n_steps: int) -> bool:
    """Whether a run that stopped after this step had yet to validate it: it was stopped in the middle of that."""
    if not step or not every_n_steps or step % every_n_steps or not path.exists():
        return False
    return not any("val/loss" in row and row["step"] == step for row in read_metrics(path))
