"""A sweep as it goes: a table on a terminal, lines where output goes to a file."""

from collections.abc import Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mamba3_train.sweeping import results
from mamba3_train.sweeping.journal import Journal, trial_name
from mamba3_train.sweeping.trial_process import TrialProcess


class Display:
    """What the workers do now, and what is done; a context manager around their work."""

    def __init__(self, journal: Journal, console: Console):
        self._journal, self._console = journal, console
        # No thread refreshes it: the workers start processes, and call show() often enough.
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._bar = Progress(
            TextColumn("trials"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[best]}"),
            TimeElapsedColumn(), auto_refresh=False,
        )  # fmt: skip
        self._task = self._bar.add_task("trials", total=journal.search.count, best="")

    def __enter__(self) -> "Display":
        self.changed()
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._live:
            self._live.stop()

    def say(self, line: str) -> None:
        """Print a line for good."""
        self._console.print(line, soft_wrap=True)

    def changed(self) -> None:
        """A trial is over: write results.json, count again."""
        with self._journal.held() as records:
            results.write(self._journal, records)
        best = results.best(records)
        self._bar.update(
            self._task,
            completed=sum(record.state not in ("running", "stopped") for record in records),
            best=f"best {best.name} {best.loss:.4f}" if best else "",
        )

    def show(self, running: Mapping[int, TrialProcess]) -> None:
        """Show what each worker trains."""
        if not self._live:
            return
        table = Table("worker", "trial", "values", "step", "train/loss", "val/loss", "tokens/s")
        for worker, training in sorted(running.items()):
            newest = training.metrics.newest
            values = ", ".join(f"{key}={value}" for key, value in training.claim.values.items())
            figures = (
                form.format(newest[key]) if newest.get(key) is not None else ""
                for key, form in (("train/loss", "{:.4f}"), ("val/loss", "{:.4f}"), ("tokens_per_second", "{:,.0f}"))
            )
            step = f"{training.step:,}/{training.last_step:,}"
            table.add_row(str(worker), trial_name(training.claim.number), values, step, *figures)
        self._live.update(Group(table, self._bar), refresh=True)
