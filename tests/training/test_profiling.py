"""The profiler's window is written to the run folder, and nothing outside it is recorded."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch

from mamba3_train.errors import UserError
from mamba3_train.training.callbacks import Profiling


def run(folder, steps, of=6, begin=1, rank=0):
    callback = Profiling(folder, steps)
    module = SimpleNamespace(device=torch.device("cpu"))
    for step in range(begin, of + 1):
        trainer = SimpleNamespace(is_global_zero=rank == 0, global_step=step - 1, max_steps=of)
        callback.on_train_batch_start(trainer, module, None, 0)
        with torch.profiler.record_function(f"this is step {step}"):
            torch.ones(3) + 1
        trainer.global_step = step
        callback.on_train_batch_end(trainer, module, None, None, 0)


@pytest.mark.parametrize(
    ("steps", "begin", "recorded"), [([2, 3], 1, [2, 3]), ([2, 4], 3, [3, 4]), ([5, 90], 1, [5, 6]), ([1, 1], 2, [])]
)
def test_the_steps_of_the_window_are_recorded(steps, begin, recorded, tmp_path):
    run(tmp_path, steps, begin=begin)
    written = list(tmp_path.glob("profile/*.trace.json.gz"))
    assert len(written) == bool(recorded)
    for path in written:
        names = {event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}
        assert {step for step in range(1, 7) if f"this is step {step}" in names} == set(recorded)
        assert "aten::add" in names


def test_other_ranks_record_nothing(tmp_path):
    run(tmp_path, [1, 2], rank=1)
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("steps", [[], [3], [3, 2], [0, 2], [1, 2, 3]])
def test_windows_that_are_none_are_refused(steps, tmp_path):
    with pytest.raises(UserError, match="must be \\[first,last\\]"):
        Profiling(tmp_path, steps)
