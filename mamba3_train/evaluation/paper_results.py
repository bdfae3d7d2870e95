"""The seven tasks of the paper, and what it reports for them (arXiv 2603.15569, table 3)."""

from dataclasses import dataclass

TASKS = {
    # Name in lm-evaluation-harness → short name, metric. The paper does not name the metric; these are Mamba's.
    "lambada_openai": ("LAMBADA", "acc"),
    "hellaswag": ("HellaSwag", "acc_norm"),
    "piqa": ("PIQA", "acc"),
    "arc_easy": ("ARC-e", "acc"),
    "arc_challenge": ("ARC-c", "acc_norm"),
    "winogrande": ("WinoGrande", "acc"),
    "openbookqa": ("OBQA", "acc_norm"),
}


@dataclass(frozen=True)
class PaperRow:
    """A model of the paper after 100 billion tokens.

    size: its name there. parameters: about. accuracies: percent, in the order of `TASKS`.
    """

    size: str
    parameters: float
    model: str
    accuracies: tuple[float, ...]


ROWS = (
    PaperRow("180M", 187e6, "Transformer", (32.5, 39.0, 67.1, 59.8, 27.9, 51.2, 21.8)),
    PaperRow("180M", 187e6, "Mamba-2", (30.9, 40.1, 66.8, 60.1, 27.3, 52.0, 23.2)),
    PaperRow("180M", 187e6, "Mamba-3 SISO", (32.5, 40.8, 66.1, 61.5, 27.9, 52.0, 22.8)),
    PaperRow("180M", 187e6, "Mamba-3 MIMO", (34.0, 41.0, 66.7, 60.6, 27.7, 52.9, 22.0)),
    PaperRow("440M", 443e6, "Transformer", (41.7, 50.5, 69.9, 67.6, 34.6, 56.7, 26.0)),
    PaperRow("440M", 443e6, "Mamba-2", (40.8, 51.7, 70.6, 68.8, 35.0, 54.1, 26.0)),
    PaperRow("440M", 443e6, "Mamba-3 SISO", (40.2, 51.7, 71.9, 68.9, 34.4, 55.8, 26.0)),
    PaperRow("440M", 443e6, "Mamba-3 MIMO", (43.4, 52.8, 70.8, 69.6, 35.6, 56.3, 28.4)),
    PaperRow("880M", 893e6, "Transformer", (44.7, 57.2, 72.6, 71.6, 39.2, 57.7, 26.8)),
    PaperRow("880M", 893e6, "Mamba-2", (45.0, 58.1, 72.5, 72.3, 38.7, 56.8, 30.2)),
    PaperRow("880M", 893e6, "Mamba-3 SISO", (47.2, 58.8, 73.6, 72.7, 40.2, 58.4, 30.0)),
    PaperRow("880M", 893e6, "Mamba-3 MIMO", (49.5, 59.2, 73.7, 74.7, 41.2, 59.9, 28.6)),
    PaperRow("1.5B", 1495e6, "Transformer", (50.3, 60.6, 73.8, 74.0, 40.4, 58.7, 29.6)),
    PaperRow("1.5B", 1495e6, "Mamba-2", (47.8, 61.4, 73.6, 75.3, 41.8, 57.5, 32.6)),
    PaperRow("1.5B", 1495e6, "Mamba-3 SISO", (49.4, 61.9, 73.6, 75.9, 42.7, 59.4, 32.0)),
    PaperRow("1.5B", 1495e6, "Mamba-3 MIMO", (51.7, 62.3, 75.3, 76.5, 44.5, 60.6, 32.6)),
)


def rows_of_size(parameters: int) -> list[PaperRow]:
    """The paper's models of the nearest size."""
    nearest = min(ROWS, key=lambda row: abs(row.parameters - parameters))
    return [row for row in ROWS if row.size == nearest.size]
