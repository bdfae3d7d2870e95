"""Sweeps of stub trainings; `stub_sweep.py FOLDER NUMBER` is one that is killed while it trains that trial."""

import os
import signal
import sys
from pathlib import Path

from mamba3_train.sweeping.journal import Journal, trial_name
from mamba3_train.sweeping.search import Search
from mamba3_train.sweeping.space import Interval
from mamba3_train.sweeping.trial_process import TrialProcess
from mamba3_train.sweeping.workers import Workers

STUB = Path(__file__).with_name("stub_training.py")
SPACE = [Interval("optimizer.lr", 1e-4, 1e-1, log=True, integer=False, points=8)]


class Events:
    """A display that remembers; in trial `die_in` it kills the sweep and its trainings once a step is logged."""

    def __init__(self, die_in: int | None = None):
        self.lines, self.die_in = [], die_in

    def say(self, line: str) -> None:
        self.lines.append(line)

    def changed(self) -> None:
        pass

    def show(self, running) -> None:
        for training in running.values():
            if training.claim.number == self.die_in and training.step:
                for other in running.values():
                    other.kill()
                os.kill(os.getpid(), signal.SIGKILL)


def make_journal(folder: Path, identity: dict | None = None, **search) -> Journal:
    command = {"given": [], "max_steps": 4, "validate_every": 1, "rows": 8, "length": 8, "equal_tokens": True}
    about = {"name": "stub", "command": command, "keys": {"optimizer.lr": True}, "identity": identity or {}}
    return Journal(folder, about, Search(dimensions=SPACE, startup_trials=2, **search))


def sweep(
    journal: Journal, *, kinds: dict[int, str] | None = None, workers: int = 1, events=None
) -> tuple[Events, int]:
    """Run a sweep; `kinds` has the kinds of some trials by number."""
    events = events or Events()

    def start(claim, environment):
        folder = journal.folder / trial_name(claim.number)
        values = [f"{key}={value}" for key, value in claim.values.items()]
        kind = (kinds or {}).get(claim.number)
        command = [sys.executable, "-S", str(STUB), *values, f"kind={kind}", f"run.dir={folder}"]
        return TrialProcess(claim, command, folder, 4, environment)

    environments = [{"CUDA_VISIBLE_DEVICES": str(worker)} for worker in range(workers)]
    return events, Workers(journal, start, environments, events, poll_seconds=0.01).run()


# With this seed trials 0, 1 and 3 train to their ends and the others are pruned after one or two validations.
EIGHT = {"trials": 8, "sampler_name": "tpe", "pruner_name": "median", "seed": 3}


if __name__ == "__main__":
    number = int(sys.argv[2])
    sweep(make_journal(Path(sys.argv[1]), **EIGHT), kinds={number: "waits"}, events=Events(die_in=number))
