"""Rows survive crashes, and a resumed run leaves none twice."""

import json

from mamba3_train.training.hardware import peak_flops
from mamba3_train.training.metrics_file import MetricsFile, read_metrics


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


def test_an_unknown_gpu_has_no_peak():
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") is None
    assert peak_flops("Some GPU of 2031") is None
    assert peak_flops("cpu") is None
