"""Waiting between steps: what lies between the end of one and the batch of the next, and nothing else."""

import torch

from mamba3_train.training import device_clock
from mamba3_train.training.callbacks import progress
from mamba3_train.training.device_wait import DeviceWait


def test_only_the_time_between_steps_counts(monkeypatch):
    clock = iter([10.0, 13.0, 20.0, 20.5, 30.0, 35.0])
    monkeypatch.setattr(device_clock.time, "perf_counter", lambda: next(clock))
    wait = DeviceWait(torch.device("cpu"))
    wait.step_begins()  # nothing came before the first
    wait.step_ended()  # at 10
    wait.step_begins()  # at 13
    wait.step_ended()  # at 20
    wait.step_begins()  # at 20.5
    assert wait.seconds() == 3.5
    wait.step_ended()  # at 30, then validation
    wait.step_ended()  # at 35: it does not count
    assert wait.seconds() == 0


def test_much_waiting_gets_a_word():
    row = {"step": 1, "train/loss": 2.0, "data_wait": 0.34}
    assert "waits for data 34% of the time: raise data.num_workers" in progress._figures(row)
    assert "waits" not in progress._figures(row | {"data_wait": 0.05})
