"""How trials are drawn and when they are given up, by Optuna."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mamba3_train.errors import UserError
from mamba3_train.sweeping.space import Choice, Dimension, grid

try:
    import optuna
except ImportError as error:
    raise UserError("sweeps need optuna, which is not installed: pip install 'mamba3-train[sweep]'") from error

SAMPLERS = ("random", "grid", "tpe")
PRUNERS = ("none", "median", "successive_halving")


@dataclass(frozen=True, kw_only=True)
class Search:
    """A search through a space.

    Args:
        dimensions: the space.
        sampler, pruner: their names.
        trials: how many; None takes every point of a grid, else 16.
        seed: the same one draws the same trials. With tpe that also takes the same losses in the same order, which
            several workers at a time do not give.
        startup_trials: complete trials before median prunes, and before tpe draws otherwise than at random.
        prune_after: validations that no trial is pruned before.

    Raises:
        UserError: a sampler or pruner that does not exist, or a number that does not fit.
    """

    dimensions: Sequence[Dimension]
    sampler_name: str = "random"
    pruner_name: str = "none"
    trials: int | None = None
    seed: int = 0
    startup_trials: int = 5
    prune_after: int = 1

    def __post_init__(self):
        for key, value, known in (("sampler", self.sampler_name, SAMPLERS), ("pruner", self.pruner_name, PRUNERS)):
            if value not in known:
                raise UserError(f"sweep.{key}={value} must be one of {', '.join(known)}")
        if self.sampler_name == "grid" and self.trials not in (None, self.count):
            raise UserError(f"sweep.trials={self.trials}, but the grid has {self.count} points: leave it null")
        for key, least in (("trials", 1), ("startup_trials", 0), ("prune_after", 0)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise UserError(f"sweep.{key}={value} must be at least {least}")

    @property
    def count(self) -> int:
        """How many trials there are to be."""
        if self.sampler_name == "grid":
            return len(grid(self.dimensions))
        return 16 if self.trials is None else self.trials

    def draw(self, trial: optuna.Trial) -> dict[str, Any]:
        """The values of a trial by key."""
        return {dimension.key: _draw(trial, dimension) for dimension in self.dimensions}

    def sampler(self) -> optuna.samplers.BaseSampler:
        """The sampler, as Optuna takes it."""
        return _ByNumber(self)

    def pruner(self) -> optuna.pruners.BasePruner:
        """The pruner, as Optuna takes it; what it calls a step is a validation."""
        if self.pruner_name == "median":
            return optuna.pruners.MedianPruner(self.startup_trials, n_warmup_steps=self.prune_after)
        if self.pruner_name == "successive_halving":
            return optuna.pruners.SuccessiveHalvingPruner(max(self.prune_after, 1), reduction_factor=3)
        return optuna.pruners.NopPruner()


class _ByNumber(optuna.samplers.BaseSampler):
    """Draws every value by a generator of its own, so that no restart and no other worker changes what is drawn."""

    def __init__(self, search: Search):
        self._search = search
        self._points = grid(search.dimensions) if search.sampler_name == "grid" else None

    def infer_relative_search_space(self, study, trial) -> dict:
        return {}

    def sample_relative(self, study, trial, search_space) -> dict:
        return {}

    def sample_independent(self, study, trial, param_name, param_distribution) -> Any:
        search = self._search
        if self._points is not None:
            return self._points[trial.number][param_name]
        seed = zlib.crc32(f"{search.seed}/{trial.number}/{param_name}".encode())
        if search.sampler_name == "random":
            sampler = optuna.samplers.RandomSampler(seed)
        else:
            # The liar keeps workers from drawing what others are just trying.
            sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=search.startup_trials, constant_liar=True)
        return sampler.sample_independent(study, trial, param_name, param_distribution)


def _draw(trial: optuna.Trial, dimension: Dimension) -> Any:
    """The value of a trial: the one it has, or a new one."""
    if isinstance(dimension, Choice):
        return dimension.value(trial.suggest_categorical(dimension.key, dimension.names))
    bounds = {"low": dimension.low, "high": dimension.high, "log": dimension.log}
    if dimension.integer:
        return dimension.value(trial.suggest_int(dimension.key, **bounds, step=dimension.step))
    return dimension.value(trial.suggest_float(dimension.key, **bounds))
