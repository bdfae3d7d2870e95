"""Sweeps of stub trainings: killed and continued, pruned, failing, stopped, shared."""

import fcntl
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from stub_sweep import EIGHT, Events, make_journal, sweep

from mamba3_train import sweep as command
from mamba3_train.errors import UserError
from mamba3_train.sweeping import results, workers
from mamba3_train.sweeping.display import Display


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sweep of eight trials that nothing stopped; trial 4 would not end by itself, were it not pruned."""
    journal = make_journal(tmp_path_factory.mktemp("sweep") / "whole", **EIGHT)
    sweep(journal, kinds={4: "waits"})
    return journal.records()


def starts(journal, number):
    return len((journal.folder / f"trial-{number:04d}" / "starts").read_text().splitlines())


def test_a_sweep_finds_the_best_and_prunes_the_rest(whole):
    assert [record.number for record in whole] == list(range(8))
    assert [record.validations for record in whole] == [4, 4, 2, 4, 1, 1, 1, 1]
    assert [record.number for record in whole if record.state == "complete"] == [0, 1, 3]
    assert results.best(whole).loss == min(record.loss for record in whole if record.state == "complete")
    assert len({record.values["optimizer.lr"] for record in whole}) == 8


def test_a_sweep_killed_half_way_and_continued_is_as_if_it_never_was(tmp_path, whole):
    """SIGKILL to the sweep and its training while trial 3 trains: trial 3 goes on in its folder, then come the rest."""
    script = Path(__file__).with_name("stub_sweep.py")
    command = [sys.executable, script, tmp_path, "3"]
    killed = subprocess.run(command, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    journal = make_journal(tmp_path, **EIGHT)
    assert [record.state for record in journal.records()][3:] == ["stopped"], "half-way"
    events, stopped = sweep(journal, kinds={3: "waits"})
    assert stopped == 0
    assert events.lines[0].startswith("trial-0003 goes on after step 1: optimizer.lr=")
    assert journal.records() == whole
    assert results.best(journal.records()) == results.best(whole)
    assert [starts(journal, n) for n in range(8)] == [1, 1, 1, 2, 1, 1, 1, 1]


def test_a_finished_sweep_trains_nothing_and_may_be_made_longer(tmp_path):
    sweep(make_journal(tmp_path, trials=2))
    events, _ = sweep(make_journal(tmp_path, trials=2))
    assert events.lines == []
    journal = make_journal(tmp_path, trials=3)
    events, _ = sweep(journal)
    assert events.lines[0].startswith("trial-0002 starts")
    assert [record.state for record in journal.records()] == ["complete"] * 3


def test_failing_trials_are_recorded_and_the_others_go_on(tmp_path):
    journal = make_journal(tmp_path, sampler_name="grid")
    events, _ = sweep(journal, kinds={1: "fails", 2: "killed", 3: "diverges"})
    records = journal.records()
    assert [record.state for record in records] == ["complete", *["failed"] * 3, *["complete"] * 4]
    assert [record.error for record in records[1:4]] == [
        "the disk is on fire", "killed by SIGKILL; its last line: it printed nothing", "its val/loss is nan",
    ]  # fmt: skip
    assert "trial-0001 failed: the disk is on fire" in events.lines
    lrs = [record.values["optimizer.lr"] for record in records]
    assert (lrs[0], lrs[-1], lrs) == (1e-4, 1e-1, sorted(lrs))


def test_workers_at_the_same_time_draw_what_one_draws_and_have_their_own_gpus(tmp_path):
    one, three = make_journal(tmp_path / "one", trials=6), make_journal(tmp_path / "three", trials=6)
    sweep(one)
    sweep(three, workers=3)
    assert three.records() == one.records()
    assert len({record.values["optimizer.lr"] for record in one.records()}) == 6
    gpus = {(folder / "starts").read_text().strip() for folder in (tmp_path / "three").glob("trial-*/")}
    assert gpus <= {"0", "1", "2"}
    assert len(gpus) > 1


def test_a_trial_that_another_worker_trains_is_left_to_it(tmp_path):
    mine, other = make_journal(tmp_path, trials=2), make_journal(tmp_path, trials=2)
    taken = other.take()
    events, _ = sweep(mine)
    assert [line.split()[0] for line in events.lines] == ["trial-0001"] * 2
    assert [record.state for record in mine.records()] == ["running", "complete"]
    taken.log.close()  # as when the other worker dies
    sweep(mine)
    assert [record.state for record in mine.records()] == ["complete", "complete"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_all_trainings_and_the_sweep_goes_on_later(number, tmp_path):
    class Interrupting(Events):
        sent = False

        def show(self, running):
            if not self.sent and len(running) == 2 and all(training.step for training in running.values()):
                self.sent = True
                signal.raise_signal(number)

    journal = make_journal(tmp_path, trials=3)
    waiting = {0: "waits", 1: "waits"}
    events, stopped = sweep(journal, kinds=waiting, workers=2, events=Interrupting())
    assert stopped == number
    assert [record.state for record in journal.records()] == ["stopped", "stopped"]
    assert {"trial-0000 stopped after step 1", "trial-0001 stopped after step 1"} <= set(events.lines)
    sweep(journal, kinds=waiting)
    assert [record.state for record in journal.records()] == ["complete"] * 3


def test_a_second_signal_kills_trainings_that_do_not_leave(tmp_path, monkeypatch):
    class Interrupting(Events):
        def show(self, running):
            if all(training.step for training in running.values()):
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(workers, "AGAIN_SECONDS", 0.0)
    journal = make_journal(tmp_path, trials=1)
    events, stopped = sweep(journal, kinds={0: "stays"}, events=Interrupting())
    assert stopped == signal.SIGINT
    assert events.lines[1:] == ["trial-0000 stopped after step 1"]
    assert [record.state for record in journal.records()] == ["stopped"]


def test_a_training_that_others_stop_goes_on_unless_it_gets_nowhere(tmp_path):
    class Stopping(Events):
        def show(self, running):
            for training in running.values():
                if training.claim.number == 0 and training.step == 1 and training.first_step == 0:
                    training._process.terminate()

    journal = make_journal(tmp_path, trials=1)
    events, _ = sweep(journal, kinds={0: "waits"}, events=Stopping())
    assert "trial-0000 was stopped after step 1 by a signal that was not ours" in events.lines
    assert [record.state for record in journal.records()] == ["complete"]


def test_no_worker_replaces_results_by_older_ones(tmp_path, monkeypatch):
    """Between its look at the trials and what it writes of them, no other comes."""
    journal = make_journal(tmp_path, trials=1)
    sweep(journal)
    replace, alone = results.os.replace, []

    def replaces(partial, path):
        with (tmp_path / ".lock").open("ab") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone.append(path.name)
        replace(partial, path)

    monkeypatch.setattr(results.os, "replace", replaces)
    console = Console(quiet=True)
    Display(journal, console).changed()
    assert command.report(journal, console) == 0
    assert alone == ["results.json", "results.json", "results.png"]
    assert json.loads((tmp_path / "results.json").read_text())["best"]["trial"] == "trial-0000"
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.glob(".*.partial")) == []


def test_another_sweep_in_the_same_folder_is_refused(tmp_path):
    make_journal(tmp_path, {"optimizer.eps": 1e-8})
    with pytest.raises(UserError, match=r"holds another sweep: optimizer.eps \(1e-08 there, 1e-06 now\)"):
        make_journal(tmp_path, {"optimizer.eps": 1e-6})


def test_a_journal_cut_off_in_a_line_is_mended(tmp_path):
    sweep(make_journal(tmp_path, trials=1))
    whole = (tmp_path / "journal.log").read_bytes()
    (tmp_path / "journal.log").write_bytes(whole + b'{"op_code":4,"worker_i')
    journal = make_journal(tmp_path, trials=2)
    sweep(journal)
    assert [record.state for record in make_journal(tmp_path, trials=2).records()] == ["complete", "complete"]
