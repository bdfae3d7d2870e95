"""Reading metrics.jsonl, at once or as it grows."""

import json
import math
from collections.abc import Iterator
from pathlib import Path


def read_metrics(path: Path) -> list[dict]:
    """All complete rows of a metrics file; a last line cut off by a crash is left out."""
    return list(_rows(path.read_bytes()))


class MetricsTail:
    """What the metrics file of a run says so far, while another process writes it.

    `newest` has the last value of every key, `validations` the val/loss by step, in order, NaN where it was not finite.
    A run that resumes writes its file anew; reading then starts over.
    """

    def __init__(self, path: Path):
        self.path = path
        self._restart(file_id=None)

    def read(self) -> None:
        """Take in the lines that were completed since the last call."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return
        if status.st_ino != self._file_id or status.st_size < self._offset:
            self._restart(status.st_ino)
        if status.st_size == self._offset:
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        for row in _rows(whole):
            self.newest |= row
            if "val/loss" in row:
                self.validations[row["step"]] = math.nan if row["val/loss"] is None else row["val/loss"]

    def _restart(self, file_id: int | None) -> None:
        self._file_id, self._offset = file_id, 0
        self.newest: dict = {}
        self.validations: dict[int, float] = {}


def _rows(content: bytes) -> Iterator[dict]:
    for line in content.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue
