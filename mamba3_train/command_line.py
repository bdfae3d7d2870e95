"""What was given on the command line of a Hydra job: one job of several with -m, else the whole."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig

from mamba3_train.errors import UserError

# Other values of these are other runs by themselves: recipes have names.
NAMING = ("recipe", "run.name", "run.dir")


def given_overrides() -> list[str]:
    """The overrides of this job, `key=value`, in order."""
    return list(HydraConfig.get().overrides.task)


def config_dirs() -> list[str]:
    """The user's own config folders (`--config-dir`)."""
    sources = HydraConfig.get().runtime.config_sources
    return [source.path for source in sources if source.provider == "command-line"]


def key_of(override: str) -> str:
    """The key or group that an override is for."""
    return OverridesParser.create().parse_override(override).key_or_group


@contextmanager
def one_of_many(config: DictConfig) -> Iterator[None]:
    """With -m, make a job a run by itself: a name and a folder of its own, and in sys.argv a command of its own.

    What starts processes for a run starts them with sys.argv. Without -m nothing changes.

    Raises:
        UserError: all jobs would train in one folder, or a launcher has started this process among others.
    """
    if HydraConfig.get().mode != RunMode.MULTIRUN or "run" not in config or "name" not in config.run:
        yield
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("-m trains one run after another: leave the launcher out, trainer.devices=N starts processes")
    before, folder = sys.argv, config.run.dir
    given = {key_of(override): override for override in given_overrides()}
    varied = _varied(before[1:])
    parts = [re.sub("[=/]", "_", given[key].lstrip("+")) for key in varied if key in given and key not in NAMING]
    if parts and not {"run.name", "run.dir"} & set(varied):
        config.run.name = re.sub(r"[^\w.+-]+", "_", "-".join([config.run.name, *parts])).rstrip("_")
        given["run.name"] = f"run.name={config.run.name}"
        if config.run.dir == folder:
            raise UserError(
                f"run.dir={folder} is one folder, but -m starts several runs: leave it out, or give ${{run.name}} in it"
            )
    options = [argument for path in config_dirs() for argument in ("--config-dir", path)]
    hydra = [override for override in HydraConfig.get().overrides.hydra if not override.startswith("hydra.mode=")]
    sys.argv = [before[0], *options, *hydra, *given.values()]
    try:
        yield
    finally:
        sys.argv = before


def _varied(arguments: list[str]) -> list[str]:
    """The keys that were given several values."""
    overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    parsed = OverridesParser.create().parse_overrides(overrides)
    return [override.key_or_group for override in parsed if override.is_sweep_override()]
