"""A process that makes no progress ends, says where it hung, and one lost rank does not hold the other."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from mamba3_train.training.callbacks import HangDetection
from mamba3_train.training.callbacks import hang_detection as hang_module
from mamba3_train.training.watchdog import EXIT_CODE

ALONE = """
import sys, time
from pathlib import Path
from mamba3_train.training.watchdog import Watchdog
watchdog = Watchdog(Path(sys.argv[1]))
for _ in range(6):
    watchdog.allow(1.0, "taking a nap")
    time.sleep(0.3)
if sys.argv[2] == "stop":
    watchdog.stop()
def the_nap_that_is_too_long():
    time.sleep(2.5)
the_nap_that_is_too_long()
print("awake")
"""

RANK = """
import os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from mamba3_train.training import processes
from mamba3_train.training.watchdog import Watchdog
processes.join(on_gpu=False, watchdog_seconds=4.0)
watchdog = Watchdog(Path(sys.argv[1]) / f"stacks-{dist.get_rank()}")
step = 0
while True:
    watchdog.allow(4.0, f"taking step {step}")
    dist.all_reduce(torch.ones(1))
    step += 1
    if step == 100:
        print("training", flush=True)
"""


def test_progress_keeps_it_quiet_and_a_hang_ends_it(tmp_path):
    for ending, code, said in (("hang", EXIT_CODE, ""), ("stop", 0, "awake\n")):
        command = [sys.executable, "-c", ALONE, tmp_path / "stacks", ending]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (result.returncode, result.stdout) == (code, said), result.stderr
        if ending == "hang":
            assert "no progress for 1 seconds while taking a nap" in result.stderr
            assert "the_nap_that_is_too_long" in (tmp_path / "stacks").read_text()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_one_lost_rank_does_not_hold_the_other(number, tmp_path, free_port):
    """Without a launcher that would end it: as on another host."""
    ranks = []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, "-c", RANK, tmp_path]
        piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        ranks.append(subprocess.Popen(command, env=environment, **piped))
    try:
        assert [process.stdout.readline() for process in ranks] == ["training\n"] * 2
        ranks[1].send_signal(number)
        _, err = ranks[0].communicate(timeout=60)
        # A dead partner's connection is closed, which is an error at once; a stopped one's is not.
        assert ranks[0].returncode == (EXIT_CODE if number == signal.SIGSTOP else 1), err
        if number == signal.SIGSTOP:
            assert "no progress for 4 seconds while taking step" in err
            assert "all_reduce" in (tmp_path / "stacks-0").read_text()
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def test_what_takes_long_once_is_given_more_time(tmp_path, monkeypatch):
    allowed = []
    dog = SimpleNamespace(allow=lambda seconds, doing: allowed.append((seconds, doing)), stop=lambda: None)
    monkeypatch.setattr(hang_module, "Watchdog", lambda stacks: dog)
    trainer = SimpleNamespace(global_rank=0, global_step=7)
    callback = HangDetection(10.0, tmp_path)
    callback.setup(trainer, None, "fit")
    for _ in range(2):
        callback.on_train_batch_start(trainer, None, None, 0)
        callback.on_train_batch_end(trainer, None, None, None, 0)
    callback.on_save_waited_for()
    callback.on_validation_batch_start(trainer, None, None, 0)
    callback.on_validation_batch_start(trainer, None, None, 1)
    callback.on_validation_end(trainer, None)
    assert [seconds for seconds, _ in allowed] == [30.0, 30.0, 10.0, 10.0, 10.0, 30.0, 30.0, 10.0, 10.0]
    callback.teardown(trainer, None, "fit")
    callback.on_train_batch_end(trainer, None, None, None, 0)
    assert len(allowed) == 9


def test_no_limit_is_no_watchdog(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(hang_module, "Watchdog", made.append)
    HangDetection(0.0, tmp_path).setup(SimpleNamespace(global_rank=0), None, "fit")
    assert made == []
