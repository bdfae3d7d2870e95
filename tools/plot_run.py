"""Loss, gradient norm, learning rate and throughput of one or many runs, as one PNG.

python tools/plot_run.py runs/a [runs/b …] [--output curves.png] [--smooth 0.9] [--x tokens] [--log-loss] [--skip 100]

A run is its folder, or a metrics.jsonl. Rows may be missing, keys too: what there is is drawn. Points are val/loss.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from mamba3_train.evaluation.metrics import read_metrics

PANELS = {
    "train/loss": "loss, nats a token",
    "train/grad_norm": "gradient norm, before clipping",
    "lr": "learning rate",
    "tokens_per_second": "tokens a second",
}


def metrics_of(path: Path) -> list[dict]:
    """Rows of a run, by step; SystemExit names a path that has none."""
    file = path / "metrics.jsonl" if path.is_dir() else path
    try:
        rows = read_metrics(file)
    except OSError as error:
        sys.exit(f"error: {path} is no run: {file} cannot be read ({error.strerror})")
    rows = [row for row in rows if isinstance(row, dict) and "step" in row]
    if not rows:
        sys.exit(f"error: {file} has no rows yet")
    return sorted(rows, key=lambda row: row["step"])


def series(rows: Sequence[dict], key: str, x: str, skip: int = 0) -> tuple[list[float], list[float]]:
    """x and value of the rows after step `skip` that have both as finite numbers."""
    pairs = [(row.get(x), row.get(key)) for row in rows if row["step"] > skip]
    pairs = [pair for pair in pairs if all(isinstance(value, int | float) and math.isfinite(value) for value in pair)]
    return [place for place, _ in pairs], [value for _, value in pairs]


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average, corrected for its beginning; weight 0 changes nothing."""
    average, share, out = 0.0, 0.0, []
    for value in values:
        average, share = weight * average + (1 - weight) * value, weight * share + (1 - weight)
        out.append(average / share)
    return out


def labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [(path.parent if path.name == "metrics.jsonl" else path).resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def plot(runs: dict[str, list[dict]], output: Path, *, x: str, smooth: float, skip: int, log_loss: bool) -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(12, 7), sharex=True, layout="constrained")
    colors = cycle(pyplot.rcParams["axes.prop_cycle"].by_key()["color"])
    for (name, rows), color in zip(runs.items(), colors, strict=False):
        for axis, key in zip(axes.flat, PANELS, strict=True):
            places, values = series(rows, key, x, skip)
            weight = 0.0 if key == "lr" else smooth
            if weight and values:
                axis.plot(places, values, color=color, linewidth=0.8, alpha=0.25)
            axis.plot(places, smoothed(values, weight), color=color, linewidth=1.4, label=name)
        axes.flat[0].plot(*series(rows, "val/loss", x, skip), "o", color=color, markersize=4, markeredgecolor="black")
    for axis, title in zip(axes.flat, PANELS.values(), strict=True):
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    if log_loss:
        axes.flat[0].set_yscale("log")
    for axis in axes[1]:
        axis.set_xlabel(x)
    axes.flat[0].legend(fontsize=8)
    figure.savefig(output, dpi=120)
    pyplot.close(figure)


def share(text: str) -> float:
    """A smoothing weight."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0 and less than 1")
    return value


def main() -> None:
    """Read the command line and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or metrics.jsonl files")
    parser.add_argument("--output", type=Path, help="default: curves.png, in the run's folder if there is one run")
    parser.add_argument("--smooth", type=share, default=0.0, help="weight of the past in a moving average, 0 to 1")
    parser.add_argument("--x", choices=("step", "tokens"), default="step")
    parser.add_argument("--skip", type=int, default=0, metavar="STEPS", help="leave out the first steps")
    parser.add_argument("--log-loss", action="store_true", help="logarithmic axis of the loss")
    given = parser.parse_args()
    folder = given.runs[0] if len(given.runs) == 1 and given.runs[0].is_dir() else Path()
    output = given.output or folder / "curves.png"
    runs = {name: metrics_of(path) for name, path in zip(labels(given.runs), given.runs, strict=True)}
    try:
        plot(runs, output, x=given.x, smooth=given.smooth, skip=given.skip, log_loss=given.log_loss)
    except OSError as error:
        sys.exit(f"error: {output} cannot be written ({error.strerror})")
    print(output)


if __name__ == "__main__":
    main()
