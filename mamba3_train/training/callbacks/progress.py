"""The progress bar: steps, loss, speed and time left."""

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bar,
)

from mamba3_train.training.callbacks.throughput import Throughput

# From this share of the time on, waiting for data is worth a word.
MUCH_WAITING = 0.1


class Progress(Callback):
    """A rich bar on a terminal; where output goes to a file, one line a logged row."""

    def __init__(self, throughput: Throughput, console: Console):
        self.throughput, self.console = throughput, console
        self._bar: Bar | None = None
        self._shown: dict = {}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Show the bar, from the step the run continues at."""
        if not trainer.is_global_zero or not self.console.is_terminal:
            return
        self._bar = Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self.console,
        )
        self._task = self._bar.add_task("train", total=trainer.max_steps, completed=trainer.global_step, figures="")
        self._bar.start()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch, batch_idx: int) -> None:
        """Move the bar, or print the new row."""
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.global_step, figures=_figures(self.throughput.last_row))
        self._print_new_row(trainer)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Show the new validation loss."""
        self._print_new_row(trainer)

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Leave the terminal as it was, whatever ended the run."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print_new_row(self, trainer: Trainer) -> None:
        row = self.throughput.last_row
        if self._bar is None and trainer.is_global_zero and row != self._shown:
            self._shown = dict(row)
            self.console.print(f"step {row['step']}/{trainer.max_steps}  {_figures(row)}", highlight=False)


def _figures(row: dict[str, float | None]) -> str:
    parts = []
    for key, form in (
        ("train/loss", "loss {:.4f}"),
        ("val/loss", "val {:.4f}"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
        ("mfu", "MFU {:.1%}"),
    ):
        if row.get(key) is not None:
            parts.append(form.format(row[key]))
    if row.get("data_wait", 0) >= MUCH_WAITING:
        parts.append(f"waits for data {row['data_wait']:.0%} of the time: raise data.num_workers")
    return "  ".join(parts)
