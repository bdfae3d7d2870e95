"""Asked to stop at any moment, a run saves, leaves with code 85, and goes on as if nothing had happened."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from signal_runs import MATRIX, PHASES, STEPS, name_of

from mamba3_train.training.stop_signals import STOPPED, StopSignals

pytestmark = pytest.mark.timeout(600)

WORKER = Path(__file__).with_name("signal_runs.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, quickstart_corpus):
    """Folder of all runs, and what either rank says of each."""
    folder = tmp_path_factory.mktemp("signals")
    command = [sys.executable, str(WORKER), str(folder), "--corpus", str(quickstart_corpus)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder, [json.loads((folder / f"outcomes-{rank}.json").read_text()) for rank in (0, 1)]


def losses(folder):
    """What does not depend on time, of every row."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if key in ("step", "tokens", "lr") or "/" in key} for row in rows]


@pytest.mark.parametrize("scenario", MATRIX, ids=lambda scenario: name_of(*scenario))
def test_the_signal_matrix(scenario, runs):
    folder, outcomes = runs
    phase, number, _, strategy = scenario
    name = name_of(*scenario)
    expected = 130 if number == "SIGINT" else STOPPED
    for outcome in outcomes:
        assert outcome[name] == [expected, PHASES[phase], 0]
    run, whole = folder / name, folder / strategy
    assert losses(run) == losses(whole)
    assert (run / "summary.json").exists()
    files = sorted((whole / "checkpoints" / f"step-{STEPS:08d}").glob("*.safetensors"))
    assert len(files) == 2
    for file in files:
        found, wanted = load_file(run / file.relative_to(whole)), load_file(file)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


ALONE = """
import ctypes, os, signal, sys, time
from mamba3_train.training.stop_signals import StopSignals, exit_code

def until(condition):
    while not condition():
        time.sleep(0.001)

def stuck():
    "In C, where no handler of Python's runs: a lock that is locked already."
    lock = (ctypes.c_char * 64)()
    ctypes.CDLL(None).pthread_mutex_lock(lock)
    ctypes.CDLL(None).pthread_mutex_lock(lock)

with StopSignals() as stop:
"""


def alone(*lines, nohup=False):
    """Run some lines with `stop` in a process of their own; returns exit code and output."""
    command = [sys.executable, "-c", ALONE + "".join(f"    {line}\n" for line in lines) + "print('whole')"]
    # Whoever started these tests may ignore it.
    hangup = None if nohup else lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)
    command = ["nohup", *command] if nohup else command
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, preexec_fn=hangup)
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("number", "code"), [("SIGINT", 130), ("SIGTERM", 85), ("SIGUSR1", 85), ("SIGUSR2", 85), ("SIGHUP", 85)]
)
def test_with_nothing_to_save_it_leaves_at_once_and_says_so(number, code):
    lines = [f"os.kill(os.getpid(), signal.{number})", "time.sleep(50)"]
    assert alone("try:", f"    {lines[0]}", f"    {lines[1]}", "finally:", "    print('unwound')") == (
        code,
        f"stopped by {number}; there was nothing to save, and the same command goes on\nunwound\n",
    )


def test_it_leaves_a_main_thread_that_was_just_falling_asleep():
    """What is sent in that moment interrupts no sleep: here the first one sent to the thread is lost."""
    lost = ["sent = []", "kill = signal.pthread_kill", "def lossy(*signal):"]
    lost += ["    sent.append(signal)", "    len(sent) > 1 and kill(*signal)", "signal.pthread_kill = lossy"]
    lost += ["stop.leave_after = 0.2"]
    asked = ["os.kill(os.getpid(), signal.SIGTERM)", "time.sleep(50)"]
    code, out = alone(*lost, "try:", *[f"    {line}" for line in asked], "finally:", "    print('unwound', len(sent))")
    assert (code, out.splitlines()[1:]) == (85, ["unwound 2"])


def test_it_leaves_even_where_no_handler_can_run():
    code, out = alone("stop.UNWINDING = 0.1", "os.kill(os.getpid(), signal.SIGTERM)", "stuck()")
    assert (code, out.splitlines()[0].split(";")[0]) == (85, "stopped by SIGTERM")


def test_a_slow_first_step_is_left_and_a_quick_one_is_not():
    asked = ["os.kill(os.getpid(), signal.SIGTERM)", "until(lambda: stop.received)"]
    assert alone("stop.leave_after = 0.1", *asked, "time.sleep(50)")[0] == 85
    assert alone("stop.leave_after = 50", *asked, "stop.leave_after = None") == (0, "whole\n")


def test_a_second_signal_of_the_same_kind_ends_it_at_once():
    asked = ["stop.leave_after = None", "os.kill(os.getpid(), signal.SIGTERM)", "until(lambda: stop.received)"]
    asked += ["print('going on', flush=True)", asked[1], "stuck()"]
    assert alone("stop.AGAIN = 0.0", *asked) == (128 + signal.SIGTERM, "going on\n")


def test_what_is_sent_to_launcher_and_processes_alike_counts_once():
    """And another kind counts for itself: a time limit's SIGUSR1 is followed by SIGTERM."""
    asked = ["os.kill(os.getpid(), signal.SIGUSR1)"] * 3 + ["os.kill(os.getpid(), signal.SIGTERM)"]
    noted = "until(lambda: stop.received == signal.SIGTERM)"
    passed = ["heard = []", "stop.pass_on = heard.append", "stop.leave_after = None"]
    code, out = alone(*passed, *asked, noted, "until(lambda: len(heard) == 2)", "print(sorted(heard))")
    assert (code, out) == (0, f"{[int(signal.SIGUSR1), int(signal.SIGTERM)]}\nwhole\n")


def test_a_forked_child_is_on_its_own():
    child = ["child = os.fork()", "if child == 0:", "    time.sleep(50)", "    os._exit(0)"]
    ended = ["os.kill(child, signal.SIGTERM)", "print(os.waitpid(child, 0)[1], stop.received)"]
    assert alone(*child, *ended) == (0, f"{int(signal.SIGTERM)} 0\nwhole\n")


def test_under_nohup_a_closed_terminal_is_nothing():
    code, out = alone("print(signal.getsignal(signal.SIGHUP).name)", nohup=True)
    assert (code, out) == (0, "SIG_IGN\nwhole\n")


def test_handlers_are_given_back():
    before = {number: signal.getsignal(number) for number in StopSignals.NUMBERS}
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
    assert before == {number: signal.getsignal(number) for number in before}
