"""The loss of a run as a picture."""

from pathlib import Path


def plot_loss(rows: list[dict], path: Path, title: str) -> None:
    """Write a PNG of training and validation loss over tokens, from the rows of metrics.jsonl."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for key, style in (("train/loss", "-"), ("val/loss", "o--")):
        points = [(row["tokens"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=key, markersize=4, linewidth=1.4)
            axes.annotate(f"{points[-1][1]:.3f}", points[-1], textcoords="offset points", xytext=(4, 4), fontsize=9)
    axes.set(xlabel="tokens", ylabel="loss, nats a token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_losses(runs: dict[str, list[list[dict]]], path: Path, title: str) -> None:
    """Write a PNG of validation loss over tokens, a colour for each name, a line for each of its runs' rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (name, lines) in enumerate(runs.items()):
        for i, rows in enumerate(lines):
            points = [(row["tokens"], row["val/loss"]) for row in rows if "val/loss" in row]
            label = name if i == 0 else None
            axes.plot(*zip(*points, strict=True), "o-", color=f"C{number}", label=label, markersize=3, linewidth=1.2)
    axes.set(xlabel="tokens", ylabel="validation loss, nats a token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
