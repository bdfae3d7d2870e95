"""Results of an evaluation as tables, those of the paper's tasks beside the paper's."""

import statistics

from rich.table import Table

from mamba3_train.evaluation.paper_results import TASKS, rows_of_size


def perplexity_table(sources: dict[str, dict]) -> Table:
    """A row a source."""
    drawn = Table(title="Validation", title_justify="left")
    drawn.add_column("source")
    for column in ("tokens", "bytes", "nats a token", "perplexity", "bits a byte"):
        drawn.add_column(column, justify="right")
    for name, found in sources.items():
        size, bits = found["bytes"], found["bits_per_byte"]
        drawn.add_row(
            name,
            f"{found['tokens']:,}",
            "–" if size is None else f"{size:,}",
            f"{found['loss']:.4f}",
            f"{found['perplexity']:.3f}",
            "–" if bits is None else f"{bits:.4f}",
        )
    return drawn


def task_table(tasks: dict[str, dict[str, float]]) -> Table:
    """A row a metric."""
    drawn = Table(title="lm-evaluation-harness", title_justify="left")
    for column in ("task", "metric", "value", "standard error"):
        drawn.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for task, metrics in tasks.items():
        for metric, value in metrics.items():
            if metric.endswith("_stderr") or metric in ("sample_len", "sample_count"):
                continue
            error = metrics.get(f"{metric}_stderr")
            drawn.add_row(task, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}")
    return drawn


def paper_table(tasks: dict[str, dict[str, float]], name: str, parameters: int) -> Table:
    """Percent by task and on average, and under it the paper's models of the nearest size."""
    drawn = Table(title="The paper's tasks, accuracy in percent", title_justify="left")
    drawn.add_column("model")
    for short, metric in TASKS.values():
        drawn.add_column(f"{short}\n{metric}", justify="right")
    drawn.add_column("average", justify="right")
    accuracies = [100 * tasks[task][metric] for task, (_, metric) in TASKS.items()]
    drawn.add_row(f"{name} ({parameters / 1e6:,.0f}M)", *_cells(accuracies), style="bold", end_section=True)
    for row in rows_of_size(parameters):
        drawn.add_row(f"paper: {row.size} {row.model}", *_cells(row.accuracies))
    return drawn


def _cells(accuracies) -> list[str]:
    return [*(f"{value:.1f}" for value in accuracies), f"{statistics.mean(accuracies):.1f}"]
