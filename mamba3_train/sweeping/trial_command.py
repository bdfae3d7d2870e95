"""The command of a trial: what the user gave, and the values drawn."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from mamba3_train.sweeping.space import hydra_text

TOKENS_A_STEP = ("data.global_batch_size", "data.sequence_length")


@dataclass(frozen=True)
class TrialCommand:
    """`python -m mamba3_train` with the overrides of a trial.

    Args:
        given: arguments of the sweep's command that are training's too.
        max_steps: of the config, before anything is drawn.
        validate_every: `validation.every_n_steps`, likewise.
        rows, length: rows of a step and tokens of a row, likewise.
        equal_tokens: other rows or lengths get other numbers of steps, so that every trial reads the same tokens and
            validates after the same tokens.
    """

    given: list[str]
    max_steps: int
    validate_every: int
    rows: int
    length: int
    equal_tokens: bool

    @classmethod
    def of(cls, config: DictConfig, given: list[str]) -> "TrialCommand":
        """The command of trials of this config."""
        return cls(
            given=given,
            max_steps=config.trainer.max_steps,
            validate_every=config.validation.every_n_steps,
            rows=config.data.global_batch_size,
            length=config.data.sequence_length,
            equal_tokens=config.sweep.equal_tokens,
        )

    def overrides(self, values: Mapping[str, Any]) -> list[str]:
        """What a trial adds to what was given."""
        return [f"{key}={hydra_text(value)}" for key, value in {**values, **self._length(values)}.items()]

    def steps(self, values: Mapping[str, Any]) -> int:
        """The last step of a trial."""
        return self._length(values).get("trainer.max_steps", values.get("trainer.max_steps", self.max_steps))

    def arguments(self, values: Mapping[str, Any], *, name: str, folder: str | None = None) -> list[str]:
        """All arguments of a run with these values."""
        place = [] if folder is None else [f"run.dir={hydra_text(folder)}"]
        return [*self.given, *self.overrides(values), f"run.name={hydra_text(name)}", *place]

    def _length(self, values: Mapping[str, Any]) -> dict[str, int]:
        if not self.equal_tokens or not any(key in values for key in TOKENS_A_STEP):
            return {}
        rows, length = values.get(TOKENS_A_STEP[0], self.rows), values.get(TOKENS_A_STEP[1], self.length)
        share = self.rows * self.length / (rows * length)
        settings = {"trainer.max_steps": max(round(self.max_steps * share), 1)}
        if self.validate_every:
            settings["validation.every_n_steps"] = max(round(self.validate_every * share), 1)
        return settings


def program() -> list[str]:
    """What starts a training."""
    return [sys.executable, "-m", "mamba3_train"]
