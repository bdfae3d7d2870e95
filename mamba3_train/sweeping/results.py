"""What came of a sweep: a table, results.json, results.png, the command of the best run."""

import json
import math
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

from mamba3_train.sweeping.journal import Journal, Record
from mamba3_train.sweeping.trial_command import TrialCommand

STYLES = {"complete": ("o", "tab:blue"), "pruned": ("x", "tab:gray"), "running": (".", "tab:green")}


def best(records: Sequence[Record]) -> Record | None:
    """The complete trial of the smallest loss, the earliest of equals."""
    complete = [record for record in records if record.state == "complete"]
    return min(complete, key=lambda record: record.loss, default=None)


def best_command(about: dict[str, Any], record: Record) -> str:
    """A shell command that trains with a trial's values in a run folder of its own."""
    command = TrialCommand(**about["command"])
    arguments = command.arguments(record.values, name=f"{about['name']}-best")
    return shlex.join(["python", "-m", "mamba3_train", *arguments])


def table(records: Sequence[Record], keys: Sequence[str]) -> Table:
    """All trials, best first; what is not complete at the end."""
    rows = Table("trial", *keys, "val/loss", "", title_justify="left")
    first = best(records)
    for record in sorted(records, key=_order):
        values = [str(record.values.get(key, "")) for key in keys]
        loss = "" if record.loss is None else f"{record.loss:.4f}"
        note = {"complete": "best" if record is first else "", "failed": f"failed: {record.error}"}
        state = note.get(record.state, f"{record.state} after {record.validations} validations")
        rows.add_row(record.name, *values, loss, state, style="bold" if record is first else None)
    return rows


def write(journal: Journal, records: Sequence[Record]) -> None:
    """Write results.json, whole or not at all."""
    first = best(records)
    content = {
        "name": journal.about["name"],
        "keys": list(journal.about["keys"]),
        "best": first and {
            "trial": first.name, "val/loss": first.loss, "values": first.values,
            "command": best_command(journal.about, first),
        },
        "trials": [
            {
                "trial": record.name, "state": record.state, "values": record.values,
                "val/loss": record.loss if _finite(record.loss) else None, "validations": record.validations,
                "error": record.error,
            }
            for record in records
        ],
    }  # fmt: skip
    with _whole(journal.folder / "results.json") as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def plot(records: Sequence[Record], about: dict[str, Any], path: Path) -> None:
    """Write a PNG of val/loss against each key: complete trials, pruned ones at their last loss, the best ringed."""
    from matplotlib.figure import Figure

    keys = about["keys"]  # key → whether its axis is logarithmic
    columns = min(len(keys), 3)
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(max(4.5 * columns, 6), 4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    shown = [record for record in records if _finite(record.loss)]
    for axis, key in zip(axes.flat, keys, strict=False):
        _draw(axis, key, keys[key], shown)
    for axis in axes.flat[len(keys) :]:
        axis.set_visible(False)
    for row in axes:
        row[0].set_ylabel("val/loss, nats a token")
    failed = sum(record.state == "failed" for record in records)
    note = f", {failed} failed" if failed else ""
    figure.suptitle(f"{about['name']}: {len(records)} trials{note}")
    if shown:
        axes.flat[0].legend()
    with _whole(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    partial = path.with_name(f".{path.name}.partial")
    yield partial
    os.replace(partial, path)


def _draw(axis, key: str, log: bool, records: Sequence[Record]) -> None:
    records = [record for record in records if key in record.values]
    numbers = all(isinstance(r.values[key], int | float) and not isinstance(r.values[key], bool) for r in records)
    names = sorted({str(record.values[key]) for record in records})
    place = (lambda record: record.values[key]) if numbers else (lambda record: names.index(str(record.values[key])))
    for state, (marker, color) in STYLES.items():
        points = [(place(r), r.loss) for r in records if ("running" if r.state == "stopped" else r.state) == state]
        if points:
            axis.scatter(*zip(*points, strict=True), marker=marker, color=color, label=state)
    first = best(records)
    if first:
        axis.scatter(place(first), first.loss, s=140, facecolors="none", edgecolors="tab:red", label="best")
    if numbers and log:
        axis.set_xscale("log")
    if not numbers:
        axis.set_xticks(range(len(names)), names)
        axis.margins(x=0.3)
    axis.set_xlabel(key)
    axis.grid(alpha=0.3)


def _order(record: Record) -> tuple:
    states = ("complete", "pruned", "running", "stopped", "failed")
    return states.index(record.state), record.loss if _finite(record.loss) else math.inf, record.number


def _finite(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)
