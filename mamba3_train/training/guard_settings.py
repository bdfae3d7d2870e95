"""Settings of the guards, typed: the section `guards` of a training config."""

from dataclasses import dataclass


@dataclass
class GuardsSection:
    """What is done about steps that go wrong: docs/guards.md."""

    max_nonfinite_in_a_row: int = 10
    """A step whose loss or gradient is not finite is skipped; after so many in a row the run ends with an error."""
    spike_threshold: float = 10.0
    """A step is skipped whose loss lies so many robust standard deviations above the median of recent ones. 0: none."""
    spike_window: int = 128
    """Losses that are recent; the first half window is not judged."""
    max_spikes_in_a_row: int = 10
    """After so many spikes, what was a spike becomes the new level, or with max_rollbacks the run is rolled back."""
    max_rollbacks: int = 0
    """How often a run may return to the newest checkpoint from before the spikes, and pass over the data since."""
    straggler_factor: float = 1.5
    """A rank is named whose own work takes so many times the others' in three rows in a row. 0: none is."""
