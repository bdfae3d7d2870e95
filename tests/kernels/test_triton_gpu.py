"""On a GPU: every gradient against float64, in each dtype; determinism, 262,144 tokens, packed documents, decoding."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch._inductor.utils import run_and_get_code

pytest.importorskip("triton")

from mamba3_train.checkpoint.official_mamba import mixer_from_official
from mamba3_train.kernels import ScanState, StepState, launch, mamba3_scan, mamba3_step
from mamba3_train.model import Mamba3Mixer, MixerConfig
from tests.scan_inputs import PER_TOKEN, scan_inputs

pytestmark = pytest.mark.gpu

GOLDEN = Path(__file__).parents[1] / "golden"
WEIGHTS = ("dt", "A", "B_bias", "C_bias", "D", "mimo_x", "mimo_z", "mimo_o", "norm_weight")  # float32 whatever x is
LIMIT = {torch.bfloat16: 5e-3, torch.float16: 5e-3, torch.float32: 1e-4}
SIZES = {
    "siso": {"rank": 1},
    "siso groups": {"rank": 1, "groups": 2, "pairs": 64},
    "mimo 2": {"rank": 2},
    "mimo 4": {"rank": 4},
    "mimo 8": {"rank": 8},
    "siso 64": {"rank": 1, "d_state": 64, "pairs": 16},
    "mimo 4, 64": {"rank": 4, "d_state": 64, "pairs": 16},
    "mimo 2, 80": {"rank": 2, "d_state": 80},
    "narrow": {"rank": 1, "head_dim": 32, "d_state": 64, "pairs": 16},
    "wide": {"rank": 1, "head_dim": 128, "d_state": 256, "pairs": 64},
}


def inputs_of(dtype, batch=2, seqlen=333, heads=8, norm=False, device="cpu", **sizes):
    """device: where the random numbers are drawn, which for very many takes a CPU half a minute."""
    sizes = {"head_dim": 64, "d_state": 128, "pairs": 32, "groups": 1} | sizes
    with torch.device(device):
        inputs = scan_inputs(batch, seqlen, heads, dtype=torch.float32, norm=norm, **sizes)
    # Random D can leave y close to zero, where the norm has no finite gradient.
    inputs["D"] = torch.ones_like(inputs["D"])
    return {name: t.cuda().to(torch.float32 if name in WEIGHTS else dtype) for name, t in inputs.items()}


def run(inputs, backend, widen=False, **options):
    leaves = {name: (t.double() if widen else t.clone()).requires_grad_() for name, t in inputs.items()}
    y, state = mamba3_scan(**leaves, backend=backend, return_state=True, **options)
    torch.manual_seed(1)
    d_y = torch.randn(y.shape, device="cuda").to(inputs["x"].dtype)
    ((y * d_y).sum() + (state.ssm * torch.randn(state.ssm.shape, device="cuda")).sum()).backward()
    return {"y": y, "ssm": state.ssm} | {f"d_{name}": leaf.grad for name, leaf in leaves.items()}


def errors(inputs, **options):
    actual, expected = run(inputs, "triton", **options), run(inputs, "reference", widen=True, **options)
    return {n: ((actual[n].double() - e).norm() / e.norm()).item() for n, e in expected.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("packed", [False, True])
def test_every_gradient(dtype, size, packed):
    options = {}
    if packed:
        options["document_ids"] = (torch.rand(2, 333, device="cuda") < 0.02).cumsum(1)
    norm = packed
    found = errors(inputs_of(dtype, norm=norm, **SIZES[size]), **options)
    # The angles' gradient is a small difference of what queries and keys contribute; the norm makes it smaller still.
    # Behind it few count in A's: of 200 numbers, two hold a fifth to a third of the gradient and of its error, which
    # was 0.4 to 0.5 % in five draws and 1.1 % in one.
    less = {"d_angles": 2, "d_A": 1.5 if norm else 1}
    limits = {name: LIMIT[dtype] * (1 + norm) * less.get(name, 1) for name in found}
    too_large = {name: e for name, e in found.items() if not e <= limits[name]}
    assert not too_large


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", ["siso", "siso groups", "mimo 2", "mimo 4", "mimo 8", "mimo 4, 64", "mimo 2, 80"])
def test_hopper_kernels_are_the_portable_ones(size, packed, monkeypatch):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("not a Hopper GPU")
    options = {"document_ids": (torch.rand(2, 333, device="cuda") < 0.02).cumsum(1)} if packed else {}
    inputs = inputs_of(torch.bfloat16, norm=packed, **SIZES[size])
    hopper = run(inputs, "triton", **options)
    monkeypatch.setattr("mamba3_train.kernels.sizes.runs_on_hopper", lambda *_: False)
    portable = run(inputs, "triton", **options)
    found = {n: (hopper[n].double() - e.double()).norm() / e.double().norm() for n, e in portable.items()}
    # They round in other places: at rank 1 the portable forward keeps y in 16 bits; walks back round scaled queries,
    # not y's gradient. So the two may be as far apart as each may be from the reference.
    limits = {name: 5e-3 * (1 + packed) * (2 if name == "d_angles" else 1) for name in found}
    assert {name: e.item() for name, e in found.items() if not e <= limits[name]} == {}


def test_states_hand_over():
    inputs = inputs_of(torch.bfloat16, seqlen=256)
    whole, state = mamba3_scan(**inputs, backend="triton", return_state=True)
    cut = {n: t[:, 100:] if t.dim() > 2 and t.shape[1] == 256 else t for n, t in inputs.items()}
    head = {n: t[:, :100] if t.dim() > 2 and t.shape[1] == 256 else t for n, t in inputs.items()}
    first, middle = mamba3_scan(**head, backend="triton", return_state=True)
    second, last = mamba3_scan(**cut, backend="triton", return_state=True, initial_state=ScanState(*middle))
    joined = torch.cat([first, second], dim=1).double()
    assert (joined - whole.double()).norm() <= 5e-3 * whole.double().norm()
    assert (last.ssm - state.ssm).norm() <= 5e-3 * state.ssm.norm()


@pytest.mark.parametrize("rank", [1, 4])
def test_same_bits_twice(rank):
    inputs = inputs_of(torch.bfloat16, rank=rank, seqlen=2000)
    first, second = run(inputs, "triton"), run(inputs, "triton")
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("rank", [1, 4])
def test_kept_states_are_those_computed_again(rank):
    inputs = inputs_of(torch.bfloat16, rank=rank, seqlen=2500)
    kept, again = run(inputs, "triton", keep="states"), run(inputs, "triton")
    assert [name for name in again if not torch.equal(kept[name], again[name])] == []


@pytest.mark.parametrize("rank", [1, 4])
def test_kept_outputs_are_those_computed_again_but_rounded(rank):
    inputs = inputs_of(torch.bfloat16, rank=rank, seqlen=2500)
    kept, again = run(inputs, "triton", keep="outputs"), run(inputs, "triton", keep="states")
    through_the_gate = {name for name in again if not torch.equal(kept[name], again[name])}
    assert through_the_gate <= {"d_z", "d_mimo_z", "d_mimo_o"}
    for name in through_the_gate:
        assert (kept[name].double() - again[name].double()).norm() <= 5e-3 * again[name].double().norm(), name


@pytest.mark.parametrize("rank", [1, 4])
def test_walks_across_spans_of_a_long_row(rank):
    """One row of 64 heads is walked in four parts forward; a backward that keeps nothing sums all spans first."""
    inputs = inputs_of(torch.bfloat16, batch=1, seqlen=16_384, rank=rank, heads=64, device="cuda")
    kept, again = run(inputs, "triton"), run(inputs, "triton", keep="inputs")
    found = {n: ((kept[n].double() - e.double()).norm() / e.double().norm()).item() for n, e in again.items()}
    assert {name: e for name, e in found.items() if not e <= 1e-3 * (1 + 4 * (name == "d_angles"))} == {}


@pytest.mark.parametrize("rank", [1, 4])
def test_one_row_of_262144_tokens(rank):
    """The end of a long row is what a row that starts shortly before with the state there gives."""
    inputs = inputs_of(torch.bfloat16, batch=1, seqlen=2**18, rank=rank, heads=64, device="cuda")
    with torch.no_grad():
        whole = mamba3_scan(**inputs, backend="triton")
        at = 2**18 - 1000
        parts = [{n: t[:, s] if t.dim() > 2 and t.shape[1] == 2**18 else t for n, t in inputs.items()}
                 for s in (slice(0, at), slice(at, None))]  # fmt: skip
        _, state = mamba3_scan(**parts[0], backend="triton", return_state=True)
        tail = mamba3_scan(**parts[1], backend="triton", initial_state=state)
    expected = whole[:, at:].double()
    assert (tail.double() - expected).norm() <= 5e-3 * expected.norm()


def token(inputs, at=0):
    return {n: t[:, at : at + 1] if n in PER_TOKEN else t for n, t in inputs.items()}


def start(inputs, ssm_dtype):
    batch, _, heads, head_dim = inputs["x"].shape
    rank, groups, d_state = inputs["B"].shape[2:]
    shapes = (batch, heads, head_dim, d_state), (batch, rank, groups, d_state)
    return StepState.zeros(*shapes, ssm_dtype=ssm_dtype, dtype=inputs["x"].dtype, device="cuda")


@pytest.mark.parametrize("ssm_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_steps_are_the_scan(size, norm, ssm_dtype):
    inputs = inputs_of(torch.bfloat16, seqlen=40, norm=norm, **SIZES[size])
    expected, after = mamba3_scan(**{n: t.double() for n, t in inputs.items()}, return_state=True)
    state = start(inputs, ssm_dtype)
    y = torch.cat([mamba3_step(**token(inputs, t), state=state, backend="triton") for t in range(40)], dim=1)
    limit = 5e-3 if ssm_dtype == torch.float32 else 1.5e-2
    assert (y.double() - expected).norm() <= limit * expected.norm()
    assert (state.ssm.double() - after.ssm).norm() <= limit * after.ssm.norm()


@pytest.mark.parametrize("rank", [1, 4])
@torch.no_grad()
def test_steps_replayed_from_a_cuda_graph(rank):
    inputs = inputs_of(torch.bfloat16, rank=rank, seqlen=20)
    state, replayed = start(inputs, torch.bfloat16), start(inputs, torch.bfloat16)
    expected = [mamba3_step(**token(inputs, t), state=state, backend="triton") for t in range(20)]
    place = {n: t.clone() for n, t in token(inputs).items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = mamba3_step(**place, state=replayed, backend="triton")
    for t in range(20):
        for name, tensor in token(inputs, t).items():
            place[name].copy_(tensor)
        graph.replay()
        torch.testing.assert_close(y, expected[t], rtol=0, atol=0, msg=lambda found, t=t: f"token {t}: {found}")
    torch.testing.assert_close(tuple(replayed), tuple(state), rtol=0, atol=0)


@torch.no_grad()
def test_a_state_of_more_than_2_31_elements():
    inputs = inputs_of(torch.bfloat16, batch=4100, seqlen=1, heads=64, device="cuda")
    state = start(inputs, torch.bfloat16)
    state.ssm[-1].normal_()
    last = StepState.of(ScanState(*(t[-1:] for t in state)))
    alone = {n: t[-1:] if n in PER_TOKEN else t for n, t in inputs.items()}
    y = mamba3_step(**inputs, state=state, backend="triton")
    expected = mamba3_step(**alone, state=last, backend="triton")
    torch.testing.assert_close(y[-1:], expected, rtol=0, atol=0)
    torch.testing.assert_close(state.ssm[-1:], last.ssm, rtol=0, atol=0)


def test_no_wait_for_the_device():
    inputs = inputs_of(torch.bfloat16)
    ids = torch.zeros(2, 333, dtype=torch.int32, device="cuda")
    run(inputs, "triton", document_ids=ids)
    state = start(inputs, torch.float32)
    with torch.no_grad():
        mamba3_step(**token(inputs), state=state, backend="triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            mamba3_step(**token(inputs), state=state, backend="triton")
        leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
        y = mamba3_scan(**leaves, backend="triton", document_ids=ids)
        y.backward(y.detach())
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_longer_rows_compile_nothing_new():
    run(inputs_of(torch.bfloat16), "triton")
    compiled = set(launch._checked)
    assert compiled
    for batch, seqlen in ((1, 1), (1, 64), (3, 1000)):
        run(inputs_of(torch.bfloat16, batch=batch, seqlen=seqlen), "triton")
    assert launch._checked == compiled


def test_a_compiled_mixer_copies_no_columns_of_its_projection():
    with torch.device("cuda"):
        mixer = Mamba3Mixer(512, MixerConfig(d_state=128, head_dim=64, rank=4), kernels="triton")
        u = torch.randn(2, 512, 512, requires_grad=True)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    torch._dynamo.reset()
    compiled = torch.compile(mixer, dynamic=False)

    def step():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y = compiled(u)
        y.sum().backward()

    _, codes = run_and_get_code(step)
    copies = [line for code in codes for line in code.splitlines() if re.match(r"triton_\w+_scan(_|\b)", line)]
    assert codes
    assert not copies


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.glob("mixer_*.safetensors")))
def test_golden_vectors_of_the_public_model(name):
    with safe_open(GOLDEN / name, "pt") as file:
        golden = {key: file.get_tensor(key).float().cuda() for key in file.keys()}  # noqa: SIM118 (no mapping)
        config = json.loads(file.metadata()["config"])
    parameters = {key.removeprefix("param."): t for key, t in golden.items() if key.startswith("param.")}
    with torch.device("cuda"):
        mixer = mixer_from_official(config, parameters, kernels="triton").cuda()
    u = golden["u"].requires_grad_()
    y = mixer(u)
    y.backward(golden["dy"])
    for actual, expected in ((y, golden["y"]), (u.grad, golden["du"])):
        assert (actual - expected).norm() <= 2e-4 * expected.norm()
