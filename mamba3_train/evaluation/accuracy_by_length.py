"""Accuracy of a synthetic task at lengths up to, and beyond, those of training."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

ROWS = 32
"""Documents in one forward pass."""


@torch.no_grad()
def scaled_accuracy(
    model: Callable[[Tensor], Tensor],
    examples: Callable[[int, int], tuple[Tensor, Tensor]],
    lengths: Iterable[int],
    documents: int,
    answers: int,
    device: torch.device,
) -> dict[int, float]:
    """Share of right answers at the last token, by length of the document, scaled: 0 is chance, 1 all of them.

    Args:
        model: (batch, tokens) int64 → logits.
        examples: (length, count) → tokens (count, tokens), answers (count,); see `SyntheticRows.examples`.
        documents: how many of each length.
        answers: how many different ones there are; they are the first entries of the vocabulary.
    """
    scaled = {}
    for length in lengths:
        tokens, expected = examples(length, documents)
        right = 0
        for rows, wanted in zip(tokens.split(ROWS), expected.split(ROWS), strict=True):
            given = model(rows.to(device))[:, -1, :answers].argmax(-1)
            right += int((given.cpu() == wanted).sum())
        scaled[length] = (right / documents - 1 / answers) / (1 - 1 / answers)
    return scaled


def plot_accuracy(curves: dict[str, list[dict[int, float]]], path: Path, title: str, trained_to: int) -> None:
    """Write a PNG of scaled accuracy over length: for each name the mean of its curves, and each of them thinly."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for later, (name, runs) in zip(reversed(range(len(curves))), curves.items(), strict=True):
        lengths = sorted(runs[0])
        mean = [sum(run[length] for run in runs) / len(runs) for length in lengths]
        # The earlier the larger, so that of points in one place each is seen.
        (line,) = axes.plot(lengths, mean, "o-", label=name, markersize=4 + 2 * later)
        for run in runs if len(runs) > 1 else ():
            axes.plot(lengths, [run[length] for length in lengths], color=line.get_color(), alpha=0.3, linewidth=0.8)
    axes.axvline(trained_to, color="grey", linestyle=":", label="longest in training")
    axes.set_xscale("log", base=2)
    measured = sorted({length for runs in curves.values() for run in runs for length in run})
    axes.set_xticks(measured, measured)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set(xlabel="length of the document", ylabel="accuracy (0 %: chance)", title=title, ylim=(-0.1, 1.05))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
