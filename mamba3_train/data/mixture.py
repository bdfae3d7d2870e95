"""Which source each sample of the training order comes from: exact proportions, by arithmetic, at any position."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mamba3_train.errors import UserError

# Weights hold to one part in this many, and a cycle of this many samples holds them exactly.
CYCLE = 10_000


@dataclass(frozen=True)
class Stage:
    """Weights by source name, in force from the sample at position `begin` on."""

    begin: int
    weights: Mapping[str, float]


def read_stages(mixture, sequence_length: int) -> list[Stage]:
    """Make stages of what a person writes.

    Args:
        mixture: `{source: weight}`, or a list of `{from_tokens: N, weights: {source: weight}}` whose first begins at 0.
        sequence_length: tokens in a sample; a stage begins with the first sample that starts at or after N tokens.
    """
    if isinstance(mixture, Mapping):
        mixture = [{"weights": mixture}]
    try:
        tokens = [_whole(stage.get("from_tokens", 0)) for stage in mixture]
        stages = [Stage(-(-n // sequence_length), dict(s["weights"])) for n, s in zip(tokens, mixture, strict=True)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"data.mixture={mixture} must be {{source: weight}} or a list of {{from_tokens: N, weights: {{…}}}}"
        ) from error
    if not tokens or tokens[0] != 0 or any(a >= b for a, b in pairwise(tokens)):
        raise UserError(f"data.mixture: from_tokens must begin at 0 and rise, got {tokens}")
    return stages


def _whole(tokens: float) -> int:
    """A number of tokens, which may be written 9e10."""
    if tokens != int(tokens):
        raise ValueError(tokens)
    return int(tokens)


class Mixture:
    """The source of every position of the training order.

    A stage repeats a cycle of `CYCLE` positions in which every source stands as often as its weight says, spread so
    evenly that after any number of samples no source is a whole sample away from its share.

    Args:
        stages: by rising `begin`, the first at 0.
        sources: names of the sources; a stage that leaves one out gives it weight 0.

    Raises:
        UserError: a weight for a source that does not exist, or negative, or all zero.
    """

    def __init__(self, stages: Sequence[Stage], sources: Sequence[str]):
        self.sources = list(sources)
        self.begins = np.array([stage.begin for stage in stages])
        self._cycles = [_cycle(_quotas(stage.weights, self.sources)) for stage in stages]
        # (stages, sources): samples that each source gave before each stage.
        self._before = np.zeros((len(stages), len(self.sources)), dtype=np.int64)
        for stage in range(1, len(stages)):
            length = self.begins[stage] - self.begins[stage - 1]
            self._before[stage] = self._before[stage - 1] + self._counts(stage - 1, length)

    def assign(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find what stands at positions of the training order.

        Returns:
            sources: index into `self.sources`, for each position.
            indices: how many samples of that source come earlier.
        """
        positions = np.asarray(positions, dtype=np.int64)
        sources, indices = np.empty_like(positions), np.empty_like(positions)
        stages = np.searchsorted(self.begins, positions, side="right") - 1
        for stage in np.unique(stages):
            here = stages == stage
            order, counts = self._cycles[stage]
            cycles, places = np.divmod(positions[here] - self.begins[stage], CYCLE)
            chosen = order[places]
            sources[here] = chosen
            indices[here] = self._before[stage, chosen] + cycles * counts[CYCLE, chosen] + counts[places, chosen]
        return sources, indices

    def uses(self, source: str) -> bool:
        """Whether any stage gives a source a weight."""
        return any(cycle[1][CYCLE, self.sources.index(source)] for cycle in self._cycles)

    def consumed(self, position: int) -> dict[str, int]:
        """Samples that each source gave before a position."""
        stage = int(np.searchsorted(self.begins, position, side="right")) - 1
        counts = self._before[stage] + self._counts(stage, position - int(self.begins[stage]))
        return dict(zip(self.sources, counts.tolist(), strict=True))

    def _counts(self, stage: int, length: int) -> np.ndarray:
        counts = self._cycles[stage][1]
        return length // CYCLE * counts[CYCLE] + counts[length % CYCLE]


def _quotas(weights: Mapping[str, float], sources: Sequence[str]) -> np.ndarray:
    """Places in a cycle for each source: weights rounded so that they fill it (largest remainders)."""
    unknown = [name for name in weights if name not in sources]
    if unknown:
        raise UserError(f"data.mixture names the source {unknown[0]}; the corpus has: {', '.join(sources)}")
    values = np.array([float(weights.get(name, 0)) for name in sources])
    if (values < 0).any() or not values.sum() > 0:
        raise UserError(f"data.mixture: weights must be at least 0 and not all 0, got {dict(weights)}")
    exact = values / values.sum() * CYCLE
    quotas = np.floor(exact + 1e-9).astype(np.int64)
    largest = np.argsort(quotas - exact, kind="stable")[: CYCLE - quotas.sum()]
    quotas[largest] += 1
    return quotas


def _cycle(quotas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spread sources over a cycle so that every prefix is within one sample of every share (Tijdeman's algorithm).

    Returns:
        order: (CYCLE,) the source at each place.
        counts: (CYCLE + 1, sources) how often each source stands before each place.
    """
    shares = quotas / CYCLE
    present = int((quotas > 0).sum())
    # The least worst-case distance from the shares that can be kept with this many sources.
    distance = 1 - 1 / (2 * present - 2) if present > 1 else 0.0
    order = np.empty(CYCLE, dtype=np.int64)
    counts = np.zeros((CYCLE + 1, len(quotas)), dtype=np.int64)
    safe = np.where(quotas > 0, shares, 1.0)
    for place in range(CYCLE):
        lead = shares * (place + 1) - counts[place]
        urgency = np.where((quotas > 0) & (lead >= 1 - distance - 1e-9), (distance - lead) / safe, np.inf)
        order[place] = urgency.argmin()
        counts[place + 1] = counts[place]
        counts[place + 1, order[place]] += 1
    return order, counts
