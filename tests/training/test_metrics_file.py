"""Rows survive crashes, and a resumed run leaves none twice."""

import errno
import json
import resource
from pathlib import Path

import pytest

from mamba3_train.errors import UserError
from mamba3_train.evaluation.metrics import read_metrics
from mamba3_train.training.hardware import peak_flops
from mamba3_train.training.metrics_file import MetricsFile


def test_rows_after_the_resumed_step_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in (5, 10, 15):
        file.log_metrics({"step": step, "train/loss": 1.0 / step}, step=step)
    with path.open("a") as crashed:
        crashed.write('{"step": 20, "train/lo')
    assert [row["step"] for row in read_metrics(path)] == [5, 10, 15]
    resumed = MetricsFile(path, from_step=10)
    resumed.log_metrics({"step": 15, "mfu": None}, step=15)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [5, 10, 15]
    assert read_metrics(path)[-1] == {"step": 15, "mfu": None}


def test_rows_that_storage_refuses_are_written_later_and_none_is_torn(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.log_metrics({"step": 1})
    # The kernel refuses to let a file grow beyond so many bytes: a short write, then an error, as on a full disk.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limits[1]))
    try:
        file.log_metrics({"step": 2})
        file.log_metrics({"step": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == '{"step": 1}\n'
    assert caplog.text.count("its rows wait in memory") == 1
    file.log_metrics({"step": 4})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_rows_that_cannot_be_dropped_end_the_run_in_words(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be written: No space left on device"):
        MetricsFile(path, from_step=1)


def test_an_unknown_gpu_has_no_peak():
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") is None
    assert peak_flops("Some GPU of 2031") is None
    assert peak_flops("cpu") is None
