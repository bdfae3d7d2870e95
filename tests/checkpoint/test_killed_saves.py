"""SIGKILL at a random moment of saving, 200 times: what is found afterwards loads, and its hashes match."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from mamba3_train.checkpoint import folders, sharded
from tests.checkpoint.small_training import DOCUMENTS

# Python and PyTorch are loaded once; each child to be killed is a fork of this process.
NURSERY = """
import os, sys, time
from pathlib import Path
import torch
from mamba3_train.checkpoint import folders
from mamba3_train.checkpoint.saver import Saver
from tests.checkpoint.test_killed_saves import DOCUMENTS, tensors

torch.set_num_threads(1)
checkpoints, asynchronous = Path(sys.argv[1]), sys.argv[2] == "True"
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        folders.remove_leftovers(checkpoints)
        saver = Saver(checkpoints, asynchronous=asynchronous, keep_last=2)
        for step in range(int(line), int(line) + 1000):
            begin = time.perf_counter()
            saver.start(step, tensors(step), DOCUMENTS)
            saver.wait()
            if step == int(line):
                print(os.getpid(), time.perf_counter() - begin, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


def tensors(step):
    return {f"layer.{i}": torch.full((64, 64), float(step + i)) for i in range(4)}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_a_killed_process_leaves_is_whole(asynchronous, tmp_path):
    command = [sys.executable, "-c", NURSERY, tmp_path, str(asynchronous)]
    nursery = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    moments = random.Random(0)
    newest = unfinished = 0
    for _ in range(100):
        print(newest + 1, file=nursery.stdin, flush=True)
        child, seconds = nursery.stdout.readline().split()
        # Somewhere in the second save, or the third.
        time.sleep(moments.uniform(0.0, 2.0 * float(seconds)))
        os.kill(int(child), signal.SIGKILL)
        assert nursery.stdout.readline() == "dead\n"
        unfinished += bool(list(tmp_path.glob(".step-*")))
        whole = folders.newest_whole(tmp_path)
        assert whole == folders.published(tmp_path)[-1], "the newest that bears a name is damaged"
        step = int(whole.name.removeprefix("step-"))
        assert step > newest, "a checkpoint is lost"
        newest = step
        loaded = {name: torch.zeros_like(value) for name, value in tensors(step).items()}
        sharded.load(whole, loaded)
        assert all(torch.equal(loaded[name], value) for name, value in tensors(step).items())
        assert {path.name for path in whole.iterdir()} >= {*DOCUMENTS, folders.MANIFEST}
    nursery.stdin.close()
    assert nursery.wait(timeout=60) == 0
    assert unfinished > 20, "hardly any kill hit a save"
    print(f"{unfinished} of 100 kills left a save unfinished; {newest} steps were saved")
