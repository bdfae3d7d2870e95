"""The kernels for Hopper equal the reference, run program by program on the CPU; see `gluon_interpreter`.

On the GPU `test_triton_gpu.py` runs the real ones.
"""

import math

import pytest
import torch
from gluon_interpreter import Function, interpreted

from mamba3_train.kernels import launch, launch_table, mamba3_scan, sizes, state_walks, triton_scan
from tests.kernels.test_triton_scan import DEVICE, _poison, check, documents, error  # noqa: F401
from tests.scan_inputs import scan_inputs, scan_state

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="there the compiled kernels are tested")


@pytest.fixture(scope="module")
def package():
    return interpreted("mamba3_train.kernels.hopper")


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch, package):
    """Every scan takes the kernels for Hopper, in tiles of 64 rows."""
    for module in (sizes, state_walks, triton_scan):
        monkeypatch.setattr(module, "hopper", lambda: package)
    monkeypatch.setattr(sizes, "runs_on_hopper", lambda inputs, chunk: True)
    monkeypatch.setattr(sizes, "choose", lambda rank, *_: launch.Launch(chunk=64 // rank, heads=2))


def inputs_of(seqlen, rank=1, groups=1, heads=2, pairs=16, d_state=64, norm=False, batch=1):
    return scan_inputs(batch, seqlen, heads, 64, d_state, rank, groups, pairs, torch.float32, norm)


CASES = {
    "siso": ({"seqlen": 70}, {}),
    "siso, documents, states, norm": ({"seqlen": 70, "groups": 2, "norm": True}, {"ids": True, "state": True}),
    "siso, all rotated": ({"seqlen": 66, "d_state": 32, "batch": 2}, {}),
    "mimo 2": ({"seqlen": 70, "rank": 2, "pairs": 32, "d_state": 128}, {"ids": True}),
    "mimo 4, documents, states, norm": ({"seqlen": 37, "rank": 4, "norm": True}, {"ids": True, "state": True}),
    "mimo 4, states kept": ({"seqlen": 37, "rank": 4, "heads": 4, "groups": 2}, {"keep": "states"}),
    "siso, states kept": ({"seqlen": 130, "heads": 4}, {"keep": "states"}),
    "mimo 4, documents, outputs kept": ({"seqlen": 37, "rank": 4, "heads": 4}, {"ids": True, "keep": "outputs"}),
    "siso, states, outputs kept": ({"seqlen": 130, "batch": 2}, {"state": True, "keep": "outputs"}),
    "mimo 2, norm, outputs asked for": ({"seqlen": 37, "rank": 2, "norm": True}, {"keep": "outputs"}),
    "mimo 8, two passes": ({"seqlen": 20, "rank": 8, "heads": 4, "groups": 2}, {}),
    "mimo 4, all rotated, long": ({"seqlen": 125, "rank": 4, "pairs": 64, "d_state": 128}, {"ids": True}),
    "mimo 2, initial state, long": ({"seqlen": 300, "rank": 2, "pairs": 32, "d_state": 96}, {"state": True}),
    "siso, documents, states, long": ({"seqlen": 330, "pairs": 32, "d_state": 128}, {"ids": True, "state": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_whole_scan_and_all_gradients(case, monkeypatch):
    """In spans of one chunk or two; where documents and states make it hardest, along whole sequences.

    The long ones' walks cross a span's end: two programs a head forward.
    """
    monkeypatch.setattr(launch_table, "chunks_of_span", lambda rank: min(rank, 2))
    monkeypatch.setattr(sizes, "FEWEST_WALKS", 1 if "states" in case else 1000)
    monkeypatch.setattr(launch_table, "WALKS", 4 if "long" in case else 256)
    shape, options = CASES[case]
    inputs, options = inputs_of(**shape), dict(options)
    if options.pop("ids", False):
        options["document_ids"] = documents(*inputs["x"].shape[:2])
    if options.pop("state", False):
        options["state"] = scan_state(inputs)
    check(inputs, **options)


def run_in_bfloat16(kernel, grid, *args, **options):
    """Triton's interpreter gets bfloat16 wrong: the stages it runs take and give it as float32, rounded after them."""
    if isinstance(kernel, Function):
        return kernel[grid](*args, **options)
    wide = {id(a): a.float() for a in args if torch.is_tensor(a) and a.dtype == torch.bfloat16}
    kernel[grid](*(wide.get(id(a), a) for a in args), **options | ({"EXACT": True} if "EXACT" in options else {}))
    for a in args:
        if id(a) in wide:
            a.copy_(wide[id(a)])


def test_rounding_in_bfloat16(monkeypatch):
    """As large as on the GPU, where the limit is the same: the angles' gradient is what queries and keys leave."""
    monkeypatch.setattr(launch_table, "chunks_of_span", lambda rank: 2)
    monkeypatch.setattr(launch, "run", run_in_bfloat16)
    inputs = inputs_of(50, rank=4, pairs=32, d_state=128)
    inputs["dt"] = torch.empty_like(inputs["dt"]).uniform_(math.log(0.001), math.log(0.1)).exp()
    inputs["D"].fill_(1)
    weights = ("dt", "A", "B_bias", "C_bias", "D", "mimo_x", "mimo_z", "mimo_o")
    inputs = {name: t if name in weights else t.bfloat16() for name, t in inputs.items()}
    d_y = torch.randn(inputs["x"].shape).bfloat16()

    def gradients(inputs, backend):
        leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
        y = mamba3_scan(**leaves, backend=backend)
        (y * d_y).sum().backward()
        return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}

    found = gradients(inputs, "triton")
    expected = gradients({name: t.double() for name, t in inputs.items()}, "reference")
    errors = {name: 100 * error(found[name], expected[name]) for name in expected}
    too_large = {name: e for name, e in errors.items() if not e <= 0.5}
    assert not too_large
