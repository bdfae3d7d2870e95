"""Which steps must not change the weights, decided on the device: no step waits for the host."""

from typing import NamedTuple

import torch
from torch import Tensor

from mamba3_train.errors import UserError

# A normal distribution's standard deviation in units of its median absolute deviation.
DEVIATIONS = 1.4826
# The spread is taken to be at least so many nats: a flat curve, of a loss near 0 above all, makes no spike of a little.
LEAST_SPREAD = 0.05


class Counts(NamedTuple):
    """What a guard has seen: skipped steps by kind, how many of each in a row up to now, and how many losses it knows.

    A step that is taken ends a row; a skipped step of the other kind neither ends it nor counts in it.
    """

    nonfinite: int
    spikes: int
    nonfinite_in_a_row: int
    spikes_in_a_row: int
    known: int

    @property
    def skipped(self) -> int:
        """All skipped steps."""
        return self.nonfinite + self.spikes

    @property
    def skipped_in_a_row(self) -> int:
        """Skipped steps since the last that was taken."""
        return self.nonfinite_in_a_row + self.spikes_in_a_row


class StepGuard:
    """Knows the losses of recent steps that were taken, and counts those that were not.

    A loss is a spike when it lies more than `spike_threshold` robust standard deviations (1.4826 times the median
    absolute deviation, at least 0.05 nats) above the median of the last `spike_window` losses; the first
    half window judges nothing.

    Args:
        max_nonfinite_in_a_row: skipped steps whose loss or gradient is not finite that are too many.
        spike_threshold: 0 takes no loss for a spike.
        spike_window: losses that are remembered.
        max_spikes_in_a_row: after so many spikes the run is to be rolled back; or, if it never is, they were none: the
            window begins anew with what follows.
        max_rollbacks: of a run.

    Raises:
        UserError: a number below its least.
    """

    def __init__(
        self,
        *,
        max_nonfinite_in_a_row: int = 10,
        spike_threshold: float = 0.0,
        spike_window: int = 128,
        max_spikes_in_a_row: int = 10,
        max_rollbacks: int = 0,
    ):
        for key, value, least in (
            ("max_nonfinite_in_a_row", max_nonfinite_in_a_row, 1),
            ("spike_threshold", spike_threshold, 0),
            ("spike_window", spike_window, 4),
            ("max_spikes_in_a_row", max_spikes_in_a_row, 1),
            ("max_rollbacks", max_rollbacks, 0),
        ):
            if value < least:
                raise UserError(f"guards.{key}={value:g} must be at least {least}")
        self.max_nonfinite_in_a_row, self.spike_threshold = max_nonfinite_in_a_row, spike_threshold
        self.max_spikes_in_a_row, self.max_rollbacks = max_spikes_in_a_row, max_rollbacks
        # Newest first; places beyond `known` hold nothing.
        self._losses = torch.zeros(spike_window)
        self._counts = torch.zeros(len(Counts._fields), dtype=torch.int64)

    def to(self, device: torch.device) -> None:
        """Move to the device that trains."""
        self._losses, self._counts = self._losses.to(device), self._counts.to(device)

    def tensors(self) -> dict[str, Tensor]:
        """All of its state by the names of a checkpoint, to save or to load into."""
        return {"guard.losses": self._losses, "guard.counts": self._counts}

    def forget(self) -> None:
        """Begin anew."""
        self._losses, self._counts = torch.zeros_like(self._losses), torch.zeros_like(self._counts)

    @property
    def skipped(self) -> Tensor:
        """Number of skipped steps, on the device."""
        return self._counts[:2].sum()

    def counts(self) -> Counts:
        """What it has seen; waits for the device."""
        return Counts(*self._counts.tolist())

    def is_spike(self, loss: Tensor) -> Tensor:
        """Whether a step with this loss, the same on every rank, is to be skipped; a bool on the device."""
        if not self.spike_threshold:
            return torch.zeros_like(loss, dtype=torch.bool)
        known = self._counts[Counts._fields.index("known")]
        median = self._median(self._losses, known)
        spread = (DEVIATIONS * self._median((self._losses - median).abs(), known)).clamp(min=LEAST_SPREAD)
        return (known >= len(self._losses) // 2) & (loss > median + self.spike_threshold * spread)

    def record(self, loss: Tensor, gradient_norm: Tensor, spike: Tensor) -> None:
        """Remember a step: its loss if it was taken, or why not.

        Args:
            loss: of the whole batch.
            gradient_norm: of the whole gradient.
            spike: what `is_spike` said.
        """
        nonfinite = ~(loss.isfinite() & gradient_norm.isfinite().to(loss.device))
        spike = spike & ~nonfinite
        taken = ~(nonfinite | spike)
        self._losses = torch.where(taken, torch.cat([loss[None], self._losses[:-1]]), self._losses)
        all_nonfinite, all_spikes, nonfinite_row, spikes_row, known = self._counts.unbind()
        known = (known + taken).clamp(max=len(self._losses))
        nonfinite_row, spikes_row = (nonfinite_row + nonfinite) * ~taken, (spikes_row + spike) * ~taken
        if not self.max_rollbacks:
            moved = spikes_row >= self.max_spikes_in_a_row
            known, spikes_row = known * ~moved, spikes_row * ~moved
        self._counts = torch.stack([all_nonfinite + nonfinite, all_spikes + spike, nonfinite_row, spikes_row, known])

    def _median(self, values: Tensor, known: Tensor) -> Tensor:
        """Median of the first `known` values; torch.nanmedian would wait for the device."""
        places = torch.arange(len(values), device=values.device)
        ordered = values.masked_fill(places >= known, torch.inf).sort().values
        return ordered.gather(0, (known - 1).clamp(min=0)[None] // 2)[0]
