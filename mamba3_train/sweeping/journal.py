"""The trials of a sweep in a file: Optuna's journal, written to by any number of workers and by whoever comes after.

A trial belongs to the worker that holds the lock of its log file. The training has that file as its output and so holds
the lock too: it is free when both are gone, however they ended, and the trial is then anybody's to go on with.
"""

import fcntl
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mamba3_train.errors import UserError
from mamba3_train.sweeping.search import Search, optuna

JournalFileBackend = optuna.storages.journal.JournalFileBackend
JournalFileOpenLock = optuna.storages.journal.JournalFileOpenLock
JournalFileSymlinkLock = optuna.storages.journal.JournalFileSymlinkLock
TrialState = optuna.trial.TrialState

Lock = JournalFileSymlinkLock | JournalFileOpenLock

FILE = "journal.log"
STATES = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}


@dataclass(frozen=True)
class Record:
    """What is known of a trial; its loss is the last one validated."""

    number: int
    state: str
    """complete, pruned, failed, running, or stopped: nobody trains it now."""
    values: dict[str, Any]
    loss: float | None
    validations: int
    error: str | None

    @property
    def name(self) -> str:
        """The name of its folder."""
        return trial_name(self.number)


@dataclass(frozen=True)
class Claim:
    """A trial that is this worker's until its log is closed."""

    number: int
    values: dict[str, Any]
    log: BinaryIO
    trial: optuna.Trial


def trial_name(number: int) -> str:
    """trial-0007."""
    return f"trial-{number:04d}"


class Journal:
    """The journal of a sweep's folder; made if it is missing.

    Args:
        folder: of the sweep.
        about: what the sweep is, kept in the journal; another `identity` in a journal that exists is refused. None
            opens a journal to look at.
        search: what new trials are drawn from; it may want more of them than before.

    Raises:
        UserError: the folder cannot be locked or written, holds another sweep, or none where one is looked at.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any] | None = None, search: Search | None = None):
        self.folder, self.search = folder, search
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        try:
            if about is None and not (folder / FILE).exists():
                raise UserError(f"{folder} holds no sweep: there is no {FILE} in it")
            folder.mkdir(parents=True, exist_ok=True)
            with self._alone():
                lock = _lock(folder / FILE)
                _mend(folder / FILE, lock)
                storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / FILE), lock))
                open_study = optuna.load_study if storage.get_all_studies() else optuna.create_study
                self._study = open_study(study_name="sweep", storage=storage)
                if "about" not in self._study.user_attrs:
                    self._study.set_user_attr("about", about)
        except OSError as error:
            raise UserError(f"the sweep's folder {folder} cannot be used: {error}") from error
        if about is not None:
            _refuse_another_sweep(folder, self.about["identity"], about["identity"])
            self._study.sampler, self._study.pruner = search.sampler(), search.pruner()

    @property
    def about(self) -> dict[str, Any]:
        """What the sweep is."""
        return self._study.user_attrs["about"]

    def take(self) -> Claim | None:
        """A trial to train: one whose worker is gone, else a new one; None where none is left."""
        with self._alone():
            trials = self._study.get_trials(deepcopy=False)
            for frozen in trials:
                if frozen.state == TrialState.RUNNING and (log := self._claim(frozen.number)):
                    return self._claimed(optuna.Trial(self._study, frozen._trial_id), log)
            if len(trials) >= self.search.count:
                return None
            trial = self._study.ask()
            return self._claimed(trial, self._claim(trial.number))

    def report(self, claim: Claim, validation: int, loss: float) -> bool:
        """Note the loss of a trial's n-th validation, counted from 1; returns whether to prune the trial."""
        noted = claim.trial.storage.get_trial(claim.trial._trial_id).intermediate_values
        if validation not in noted:
            claim.trial.report(loss, validation)
        elif validation != max(noted):
            return False  # decided before
        return claim.trial.should_prune()

    def complete(self, claim: Claim, loss: float) -> None:
        """A trial trained to its end."""
        self._study.tell(claim.number, loss)

    def prune(self, claim: Claim) -> None:
        """A trial was given up for its losses."""
        self._study.tell(claim.number, state=TrialState.PRUNED)

    def fail(self, claim: Claim, error: str) -> None:
        """A trial could not be trained."""
        claim.trial.set_user_attr("error", error)
        self._study.tell(claim.number, state=TrialState.FAIL)

    def records(self) -> list[Record]:
        """All trials, in the order they were drawn."""
        with self.held() as records:
            return records

    @contextmanager
    def held(self) -> Iterator[list[Record]]:
        """All trials, and no other worker looks at them before the block ends: a file made of them replaces older
        ones only."""
        with self._alone():
            yield [self._record(frozen) for frozen in self._study.get_trials(deepcopy=False)]

    def _record(self, frozen: optuna.trial.FrozenTrial) -> Record:
        losses = frozen.intermediate_values
        loss = frozen.value if frozen.state == TrialState.COMPLETE else losses[max(losses)] if losses else None
        state = STATES.get(frozen.state)
        if state is None:
            log = self._claim(frozen.number)
            state = "stopped" if log else "running"
            if log:
                log.close()
        attributes = frozen.user_attrs
        return Record(frozen.number, state, attributes.get("values", {}), loss, len(losses), attributes.get("error"))

    def _claimed(self, trial: optuna.Trial, log: BinaryIO) -> Claim:
        if "values" not in trial.user_attrs:
            trial.set_user_attr("values", self.search.draw(trial))
        return Claim(trial.number, trial.user_attrs["values"], log, trial)

    def _claim(self, number: int) -> BinaryIO | None:
        log = (self.folder / f"{trial_name(number)}.log").open("ab")
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.close()
            return None
        return log

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with (self.folder / ".lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _mend(path: Path, lock: Lock) -> None:
    """Drop a last line that whoever wrote it did not finish: with the next one behind it, nobody could read on."""
    if not path.exists() or path.read_bytes()[-1:] in (b"", b"\n"):
        return
    lock.acquire()  # it may be another worker's that is just being written
    try:
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
    finally:
        lock.release()


def _lock(path: Path) -> Lock:
    """Optuna's lock that works on NFS of any version, or the one for file systems without symbolic links."""
    probe = path.with_name(".symlink")  # one for all: a worker opens the journal while no other does
    try:
        probe.unlink(missing_ok=True)
        probe.symlink_to(path)
        probe.unlink()
    except OSError:
        return JournalFileOpenLock(str(path))
    return JournalFileSymlinkLock(str(path))


def _refuse_another_sweep(folder: Path, before: Mapping, now: Mapping) -> None:
    missing = object()
    keys = sorted(key for key in before.keys() | now.keys() if before.get(key, missing) != now.get(key, missing))
    if keys:
        changed = ", ".join(f"{key} ({before.get(key)} there, {now.get(key)} now)" for key in keys)
        raise UserError(f"{folder} holds another sweep: {changed}; choose another sweep.name, or change it back")
