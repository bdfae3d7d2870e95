"""What was given on the command line of a Hydra job: one job of several with -m, else the whole."""

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser


def given_overrides() -> list[str]:
    """The overrides of this job, `key=value`, in order."""
    return list(HydraConfig.get().overrides.task)


def config_dirs() -> list[str]:
    """The user's own config folders (`--config-dir`)."""
    sources = HydraConfig.get().runtime.config_sources
    return [source.path for source in sources if source.provider == "command-line"]


def job_arguments() -> list[str]:
    """Arguments of a command that does what this job does, without the other jobs of -m."""
    folders = [argument for folder in config_dirs() for argument in ("--config-dir", folder)]
    return [*folders, *HydraConfig.get().overrides.hydra, *given_overrides()]


def key_of(override: str) -> str:
    """The key or group that an override is for."""
    return OverridesParser.create().parse_override(override).key_or_group
