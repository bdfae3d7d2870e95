"""Loggers beside metrics.jsonl: one function a `logger=`; none of them can stop a run."""

import importlib.util
import logging
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from mamba3_train.errors import UserError

log = logging.getLogger(__name__)


class Tolerant(Logger):
    """Passes rows on to another logger, made at the first row; what fails there is a warning, once.

    Args:
        name: the logger, as users call it.
        choices: make the logger wanted, and then those to turn to, in order, should it not take its first row.
    """

    def __init__(self, name: str, *choices: Callable[[], Logger]):
        super().__init__()
        self._name, self._choices = name, list(choices)
        self._logger: Logger | None = None
        self._warned = False

    @property
    def name(self) -> str:
        """Lightning's name of this logger."""
        return self._name

    @property
    def version(self) -> str:
        """There is one version."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float | None], step: int | None = None) -> None:
        """Pass on one row, without what is null."""
        values = {name: value for name, value in metrics.items() if value is not None}
        while self._choices:
            try:
                self._logger = self._logger or self._choices[0]()
                self._logger.log_metrics(values, step)
                self._choices = self._choices[:1]  # it works: no other one from now on
                return
            except Exception as error:
                if len(self._choices) == 1:
                    self._warn(error)
                    return
                self._logger = None
                self._choices.pop(0)
                log.warning("logger %s does not work (%s): offline instead", self._name, _first_line(error))

    @rank_zero_only
    def log_hyperparams(self, *args, **kwargs) -> None:
        """Nothing: they are given when the logger is made."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Let it finish what it has to."""
        try:
            if self._logger is not None:
                self._logger.finalize(status)
        except Exception as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            log.warning("logger %s failed (%s): training goes on", self._name, _first_line(error))
        self._warned = True


def wandb(
    *,
    folder: str,
    settings: dict,
    project: str,
    name: str,
    offline: bool,
    entity: str | None = None,
    group: str | None = None,
    tags: Sequence[str] = (),
) -> Tolerant:
    """Weights & Biases; a resumed run goes on in the same run there, whose id is kept in the run folder.

    Where its server cannot be reached, or nobody is logged in, the run is logged offline, for `wandb sync`.

    Args:
        folder: the run's.
        settings: the resolved config, shown with the run.
        project: `name`, `entity`, `group`, `tags`: as wandb means them.
        offline: do not try to reach the server.
    """

    def make(offline: bool) -> Logger:
        import wandb as library

        library.teardown()  # a failed attempt to go online keeps the id for itself
        return WandbLogger(
            project=project, name=name, id=_wandb_id(Path(folder)), save_dir=folder, offline=offline, entity=entity,
            group=group, tags=list(tags), config=settings,
        )  # fmt: skip

    return Tolerant("wandb", *([] if offline else [lambda: make(offline=False)]), lambda: make(offline=True))


def tensorboard(*, folder: str, settings: dict) -> Tolerant:
    """TensorBoard, in `tensorboard/` of the run folder.

    Raises:
        UserError: its package is missing.
    """
    if not any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX")):
        raise UserError("logger=tensorboard needs a package that is not installed: pip install tensorboard")
    return Tolerant("tensorboard", lambda: TensorBoardLogger(folder, name="tensorboard", version=""))


def _wandb_id(folder: Path) -> str:
    path = folder / "wandb-id.txt"
    if not path.exists():
        path.write_text(secrets.token_hex(4) + "\n")
    return path.read_text().strip()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
