"""tools/profile_step.py on a made trace: what counts as what, what the GPU waited for, and the least work."""

import gzip
import json
import runpy
import sys
from pathlib import Path

import pytest
from hydra.utils import instantiate

from mamba3_train.config import compose
from mamba3_train.model.cost import model_cost

TOOLS = Path(__file__).parent.parent / "tools"
RECIPE = ["+recipe=180m_mimo", "data.path=x", "data.vocab_size=32000", "data.global_batch_size=2"]

# Name, begin, duration and launch in microseconds: two steps; 3,500 of 10,000 are without work.
KERNELS = [
    ("nvjet_hsh_128x256", 0, 4000, -50),
    ("ncclDevKernel_AllReduce", 1000, 1000, -40),
    ("chunk_key_kernel", 5000, 1000, 4800),  # of 1,000 without work the host is late for 800
    ("ncclDevKernel_AllGather", 5500, 1500, 100),  # of the next 2,000 for 200, then 800 go to communication
    ("triton_poi_fused_mul", 8000, 500, 6200),
    ("Memcpy DtoD (Device -> Device)", 9000, 500, None),  # of the next 500 is not known for what
    ("cross_entropy_kernel", 9500, 250, 100),
    ("multi_tensor_apply_kernel", 9750, 250, 100),
]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trace")
    events = []
    for number, (name, begin, duration, launched) in enumerate(KERNELS):
        cat, arguments = "gpu_memcpy" if "Memcpy" in name else "kernel", {"correlation": number}
        events.append({"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": duration, "args": arguments})
        if launched is not None:
            launch = {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernelExC", "ts": launched, "dur": 5}
            events.append(launch | {"args": arguments})
    events.append({"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 99999})
    (folder / "trace.json.gz").write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    arguments = ["--trace", str(folder / "trace.json.gz"), "--steps=2", "--ceilings", "700", "4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)
        patch.setattr(sys, "argv", ["profile_step.py", *arguments, "--json", str(folder / "result.json"), *RECIPE])
        runpy.run_path(str(TOOLS / "profile_step.py"), run_name="__main__")
    return json.loads((folder / "result.json").read_text())


def test_every_kernel_counts_for_one_part(result):
    ms = {part: row["ms"] for part, row in result["parts"].items() if row["ms"]}
    assert ms == {
        "matrix products": 2.0, "communication": 1.25, "scan": 0.5, "elementwise and rest": 0.25, "loss": 0.125,
        "copies": 0.25, "optimizer": 0.125, "step": 5.0,
        "idle: host is late": 0.5, "idle: communication": 0.4, "idle: other": 0.85,
    }  # fmt: skip
    assert result["kernels"][0] == {"name": "nvjet_hsh_128x256", "calls": 0.5, "ms": 2.0}


def test_the_least_of_a_part_is_its_work_over_the_ceilings(result):
    config = compose(*RECIPE)
    cost = model_cost(instantiate(config.model), 2048)
    scan = result["parts"]["scan"]["least_ms"]
    # 12 layers of 24 heads of 64: x, z and y, and five of their size on the way back, of 2 bytes each.
    assert scan == pytest.approx(max(3 * cost.forward_flops["scan"] / 700e9, 12 * 1536 * 16 / 4e9) * 2 * 2048)
    products = sum(cost.forward_flops[part] for part in ("projections", "mlp", "head"))
    assert result["parts"]["matrix products"]["least_ms"] == pytest.approx(3 * products * 2 * 2048 / 700e9)
    assert result["parts"]["optimizer"]["least_ms"] == pytest.approx(32 * cost.total_parameters / 4e9)
    assert result["parts"]["copies"]["least_ms"] is None
