"""metrics.jsonl: one JSON object a logged step, readable with any tool."""

import json
import os
from pathlib import Path

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only


class MetricsFile(Logger):
    """Lightning logger that appends rows to a file.

    Args:
        path: the file.
        from_step: rows after this step are dropped at the start: a resumed run writes them again.
    """

    def __init__(self, path: Path, from_step: int = 0):
        super().__init__()
        self.path = path
        self._drop_rows_after(from_step)

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
        with self.path.open("a") as file:
            file.write(json.dumps(metrics) + "\n")

    @rank_zero_only
    def log_hyperparams(self, *args, **kwargs) -> None:
        """Nothing: config.yaml holds them."""

    @rank_zero_only
    def _drop_rows_after(self, step: int) -> None:
        if not self.path.exists():
            return
        rows = read_metrics(self.path)
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))
        os.replace(partial, self.path)


def read_metrics(path: Path) -> list[dict]:
    """All complete rows of a metrics file; a last line cut off by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
