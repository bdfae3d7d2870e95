"""Learning rates as pure functions of the optimizer step, counted from 0."""

import math
from dataclasses import dataclass

from mamba3_train.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Linear warm-up over warmup_fraction of the steps, then half a cosine from peak_lr down to min_lr."""

    peak_lr: float
    min_lr: float
    total_steps: int
    warmup_fraction: float

    def __post_init__(self):
        _check_fractions(self.total_steps, warmup_fraction=self.warmup_fraction)

    def __call__(self, step: int) -> float:
        """Learning rate of the step."""
        warmup = round(self.warmup_fraction * self.total_steps)
        if step < warmup:
            return self.peak_lr * (step + 1) / warmup
        progress = min((step - warmup) / max(self.total_steps - warmup, 1), 1.0)
        return self.min_lr + (self.peak_lr - self.min_lr) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay:
    """Linear warm-up, peak_lr, and over the last decay_fraction of the steps down to min_lr by 1 − √progress."""

    peak_lr: float
    min_lr: float
    total_steps: int
    warmup_fraction: float
    decay_fraction: float

    def __post_init__(self):
        _check_fractions(self.total_steps, warmup_fraction=self.warmup_fraction, decay_fraction=self.decay_fraction)

    def __call__(self, step: int) -> float:
        """Learning rate of the step."""
        warmup = round(self.warmup_fraction * self.total_steps)
        if step < warmup:
            return self.peak_lr * (step + 1) / warmup
        decay = round(self.decay_fraction * self.total_steps)
        progress = max(step - (self.total_steps - decay), 0) / max(decay, 1)
        return self.min_lr + (self.peak_lr - self.min_lr) * (1 - math.sqrt(min(progress, 1.0)))


def _check_fractions(total_steps: int, **fractions: float) -> None:
    if total_steps < 1:
        raise UserError(f"schedule.total_steps={total_steps} must be at least 1: set trainer.max_steps")
    if any(not 0 <= value <= 1 for value in fractions.values()) or sum(fractions.values()) > 1:
        given = ", ".join(f"schedule.{key}={value}" for key, value in fractions.items())
        raise UserError(f"{given} must each lie between 0 and 1, and together not exceed 1")
