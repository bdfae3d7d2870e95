"""How far a preparation is: documents, tokens and bytes, what comes a second, and the time left."""

from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeftColumn
from rich.text import Text


class RateColumn(ProgressColumn):
    """Counts so far and a second, since this process began with the source."""

    def render(self, task: Task) -> Text:
        """One line of text for the task."""
        seconds = max(task.elapsed or 0.0, 1e-3)
        documents, tokens, size = task.fields["documents"], task.fields["tokens"], task.completed
        begun = task.fields["begun"]
        rates = [(now - before) / seconds for now, before in zip((documents, tokens, size), begun, strict=True)]
        return Text(
            f"{short(documents)} documents {short(rates[0])}/s  {short(tokens)} tokens {short(rates[1])}/s  "
            f"{size / 1e6:,.0f} MB {rates[2] / 1e6:,.1f}/s",
            no_wrap=True,
        )


def short(number: float) -> str:
    """A number to three digits: `1234567` is `1.23M`."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def preparation_progress() -> Progress:
    """A progress display whose tasks carry `documents`, `tokens` and `begun`, the three counts at their start."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        RateColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeLeftColumn(),
    )
