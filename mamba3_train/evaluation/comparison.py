"""Runs beside each other: a table and a picture of how they ended."""

import json
import statistics
from pathlib import Path

from rich.table import Table

from mamba3_train.evaluation.accuracy_by_length import plot_accuracy
from mamba3_train.evaluation.loss_curve import plot_losses


def read(runs: list[dict], score: str) -> dict:
    """What runs ended with: `{score, runs: [{variant, seed, folder, parameters, tokens, score}]}`.

    A score is a number, or numbers by length (as text, as JSON has them).
    """
    rows = []
    for run in runs:
        summary = json.loads((Path(run["folder"]) / "summary.json").read_text())
        figures = {"parameters": summary["parameters"], "tokens": summary["tokens"], "score": summary[score]}
        rows.append({key: run[key] for key in ("variant", "seed", "folder")} | figures)
    return {"score": score, "runs": rows}


def by_variant(results: dict) -> dict[str, list[dict]]:
    """Runs of each variant."""
    groups: dict[str, list[dict]] = {}
    for run in results["runs"]:
        groups.setdefault(run["variant"], []).append(run)
    return groups


def table(results: dict) -> Table:
    """A row a variant: parameters, tokens, and the mean of the score over seeds, ± its standard deviation."""
    first = results["runs"][0]["score"]
    lengths = list(first) if isinstance(first, dict) else [None]
    seeds = len({run["seed"] for run in results["runs"]})
    title = f"{results['score']}: mean of {seeds} seeds" + (" ± standard deviation" if seeds > 1 else "")
    drawn = Table(title=title, title_justify="left")
    for column in ("variant", "parameters", "tokens"):
        drawn.add_column(column, justify="left" if column == "variant" else "right")
    for length in lengths:
        drawn.add_column(results["score"] if length is None else f"length {length}", justify="right")
    for variant, runs in by_variant(results).items():
        scores = [run["score"] for run in runs]
        cells = (_number(scores) if n is None else _share([score[n] for score in scores]) for n in lengths)
        drawn.add_row(variant, f"{runs[0]['parameters']:,}", f"{runs[0]['tokens']:,}", *cells)
    return drawn


def _number(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def _share(values: list[float]) -> str:
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation} %"


def plot(results: dict, path: Path, title: str, trained_to: int | None) -> None:
    """Write a PNG: scores over length, or where a score is one number the validation loss over tokens."""
    groups = by_variant(results)
    if isinstance(results["runs"][0]["score"], dict):
        curves = {
            name: [{int(length): value for length, value in run["score"].items()} for run in runs]
            for name, runs in groups.items()
        }
        plot_accuracy(curves, path, title, trained_to)
        return
    rows = {name: [_rows(Path(run["folder"]) / "metrics.jsonl") for run in runs] for name, runs in groups.items()}
    plot_losses(rows, path, title)


def write(results: dict, path: Path) -> None:
    """Write the numbers as JSON."""
    path.write_text(json.dumps(results, indent=1) + "\n")


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
