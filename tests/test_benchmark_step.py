"""`tools/benchmark_step.py` times the step that training runs, on several devices as well."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORKER = """
import sys
import torch.distributed as dist

def refuse(*_, **__):
    raise SystemExit("a step asked another rank's device and waited for the answer")

dist.broadcast = refuse  # Lightning does, for a signal, where it is not kept from it
sys.path.insert(0, "tools")
import benchmark_step
with benchmark_step.process_end.at_once():
    benchmark_step.main()
"""
SMALL = ["+recipe=quickstart", "data.path=x", "data.sequence_length=32", "model.n_layers=1", "data.micro_batch_size=2",
         "data.global_batch_size=4", "trainer.accelerator=cpu", "trainer.devices=2", "strategy=ddp"]  # fmt: skip


def test_two_devices_run_ahead_as_in_training(tmp_path, free_port):
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
    environment |= {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WORKER, *SMALL, "--steps", "2", "--warmup", "1", "--json", tmp_path / "step.json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [
        subprocess.Popen(command, cwd=ROOT, env=environment | {"RANK": rank, "LOCAL_RANK": rank}, **pipes)
        for rank in "01"
    ]
    printed = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], printed
    result = json.loads((tmp_path / "step.json").read_text())
    assert (result["devices"], result["tokens_per_step"], len(result["step_ms_all"])) == (2, 4 * 32, 2)
    assert result["step_ms"] > 0
