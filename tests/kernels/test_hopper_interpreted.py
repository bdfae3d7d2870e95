"""The kernels for Hopper equal the reference, run program by program on the CPU; see `gluon_interpreter`.

In float32: Triton's interpreter, which runs the stages between them, sums the phases of 16-bit inputs wrongly. On the
GPU `test_triton_gpu.py` runs the real ones.
"""

import pytest
import torch
from gluon_interpreter import interpreted

from mamba3_train.kernels import launch, sizes, triton_scan
from tests.kernels.test_triton_scan import DEVICE, _poison, check, documents  # noqa: F401
from tests.scan_inputs import scan_inputs, scan_state

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="there the compiled kernels are tested")


@pytest.fixture(scope="module")
def package():
    return interpreted("mamba3_train.kernels.hopper")


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch, package):
    """Every scan takes the kernels for Hopper, in tiles of 64 rows."""
    for module in (sizes, triton_scan):
        monkeypatch.setattr(module, "hopper", lambda: package)
    monkeypatch.setattr(sizes, "runs_on_hopper", lambda inputs, chunk: True)
    monkeypatch.setattr(sizes, "choose", lambda rank, *_: launch.Launch(chunk=64 // rank, heads=2))


def inputs_of(seqlen, rank=1, groups=1, heads=2, pairs=16, d_state=64, norm=False, batch=1):
    return scan_inputs(batch, seqlen, heads, 64, d_state, rank, groups, pairs, torch.float32, norm)


CASES = {
    "siso": ({"seqlen": 70}, {}),
    "siso, documents, states, norm": ({"seqlen": 70, "groups": 2, "norm": True}, {"ids": True, "state": True}),
    "siso, all rotated": ({"seqlen": 66, "d_state": 32, "batch": 2}, {}),
    "mimo 2": ({"seqlen": 40, "rank": 2, "pairs": 32, "d_state": 128}, {"ids": True}),
    "mimo 4, documents, states, norm": ({"seqlen": 37, "rank": 4, "norm": True}, {"ids": True, "state": True}),
    "mimo 8, two passes": ({"seqlen": 10, "rank": 8, "heads": 4, "groups": 2}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_whole_scan_and_all_gradients(case):
    shape, options = CASES[case]
    inputs, options = inputs_of(**shape), dict(options)
    if options.pop("ids", False):
        options["document_ids"] = documents(*inputs["x"].shape[:2])
    if options.pop("state", False):
        options["state"] = scan_state(inputs)
    check(inputs, **options)
