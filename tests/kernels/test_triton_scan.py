"""The Triton scan equals the reference: each stage against its counterpart, the whole with all gradients.

Without a GPU this runs in the interpreter, in float32. Every buffer the kernels write to starts as NaN.
"""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from mamba3_train.kernels import ScanState, mamba3_scan, reference
from mamba3_train.kernels.inputs import Inputs
from mamba3_train.kernels.launch import Launch
from mamba3_train.kernels.scan import KEEPS
from mamba3_train.kernels.sizes import Sizes
from mamba3_train.kernels.triton_op import scan
from mamba3_train.kernels.triton_scan import compute_scales, local_states, pass_states
from tests.scan_inputs import scan_inputs, scan_state

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
BOUNDARIES = (1, 2, 7, 16, 17, 31)  # one-token documents, at a chunk's start, at its end, across it


def inputs_of(seqlen=37, rank=1, groups=1, heads=2, pairs=4, d_state=16, norm=False, batch=2):
    inputs = scan_inputs(batch, seqlen, heads, 16, d_state, rank, groups, pairs, torch.float32, norm)
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


def documents(batch, seqlen):
    """Boundaries that differ from row to row."""
    starts = torch.zeros(batch, seqlen, dtype=torch.int32)
    for row in range(batch):
        starts[row, [t + row for t in BOUNDARIES if t + row < seqlen]] = 1
    return starts.cumsum(1).to(DEVICE)


def error(actual, expected):
    """Root mean square of the difference over that of the expected."""
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-12)).item()


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    def poisoned(make):
        def empty(*args, **kwargs):
            tensor = make(*args, **kwargs)
            filler = math.nan if tensor.is_floating_point() else 12345
            return tensor if tensor.device.type == "meta" else tensor.fill_(filler)

        return empty

    class Torch:
        """The module torch as those see it that allocate."""

        empty, empty_like = staticmethod(poisoned(torch.empty)), staticmethod(poisoned(torch.empty_like))

        def __getattr__(self, name):
            return getattr(torch, name)

    for module in ("sizes", "triton_scan"):
        monkeypatch.setattr(f"mamba3_train.kernels.{module}.torch", Torch())


def run(inputs, backend, state=None, **options):
    """Outputs, last state and every gradient, by name; the reference in float64."""
    dtype = torch.float32 if backend == "triton" else torch.float64
    inputs = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in inputs.items()}
    if state is not None:
        state = ScanState(*(tensor.detach().to(DEVICE, dtype).requires_grad_() for tensor in state))
    y, last = mamba3_scan(**inputs, initial_state=state, return_state=True, backend=backend, **options)
    torch.manual_seed(1)
    loss = (y * torch.randn(y.shape, device=DEVICE)).sum()
    if state is not None:
        loss = loss + (last.ssm * torch.randn(last.ssm.shape, device=DEVICE)).sum() + (last.x + last.B.sum()).sum()
    loss.backward()
    results = {"y": y, "ssm": last.ssm} | {f"d_{name}": tensor.grad for name, tensor in inputs.items()}
    if state is not None:
        results |= {f"d_state.{name}": tensor.grad for name, tensor in state._asdict().items()}
    return results


def check(inputs, tolerance=2e-5, **options):
    actual, expected = run(inputs, "triton", **options), run(inputs, "reference", **options)
    errors = {name: error(actual[name], expected[name]) for name in expected}
    assert all(e <= tolerance for e in errors.values()), errors  # NaN fails too


CASES = {
    "siso": ({"batch": 1}, {}),
    "siso, one chunk": ({"seqlen": 5}, {"chunk_size": 16}),
    "siso, documents and states": ({"groups": 2, "norm": True}, {"chunk_size": 16, "ids": True, "state": True}),
    "siso, all rotated": ({"pairs": 8, "seqlen": 33}, {"chunk_size": 16}),
    "siso, d_state no power of two": ({"d_state": 24, "pairs": 6, "seqlen": 20, "batch": 1}, {"chunk_size": 16}),
    "mimo 2": ({"rank": 2, "seqlen": 20, "norm": True, "batch": 1}, {"chunk_size": 8, "ids": True}),
    "mimo 4": ({"rank": 4, "seqlen": 10, "batch": 1}, {"chunk_size": 4, "state": True}),
    "mimo 4, documents and states": (
        {"rank": 4, "seqlen": 21, "groups": 2},
        {"chunk_size": 8, "ids": True, "state": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_whole_scan_and_all_gradients(case):
    sizes, options = CASES[case]
    inputs = inputs_of(**sizes)
    if options.pop("ids", False):
        options["document_ids"] = documents(*inputs["x"].shape[:2])
    if options.pop("state", False):
        options["state"] = scan_state(inputs)
    check(inputs, **options)


@pytest.mark.parametrize("missing", [("trap", "z"), ("angles",), ("B_bias", "C_bias", "D")])
def test_every_option_can_be_left_out(missing):
    inputs = inputs_of(seqlen=18, batch=1)
    check({name: tensor for name, tensor in inputs.items() if name not in missing}, chunk_size=16)


def as_columns(inputs, width=80, at=(0, 40)):
    """The same inputs with x and z as columns of one projection; H · P is 32."""
    projection = torch.full((*inputs["x"].shape[:2], width), math.nan, device=DEVICE)
    columns = {}
    for name, first in zip(("z", "x"), at, strict=True):
        columns[name] = projection[..., first : first + 32].unflatten(-1, (2, 16))
        columns[name].copy_(inputs[name])
    return inputs | columns


@pytest.mark.parametrize("sizes", [{}, {"rank": 2, "norm": True}], ids=str)
def test_columns_of_a_projection_are_read_in_place(sizes):
    contiguous = inputs_of(seqlen=37, batch=1, **sizes)
    inputs = as_columns(contiguous)
    ours = Inputs(*(inputs.get(name) for name in Inputs._fields))
    assert [t.data_ptr() for t in ours.readable() if t is not None] == [t.data_ptr() for t in ours if t is not None]
    assert ours.token_stride == 80
    actual, expected = (run(given, "triton") for given in (inputs, contiguous))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("change", ["odd width", "z elsewhere", "transposed", "rows apart", "odd address"])
def test_what_cannot_be_read_in_place_is_copied(change):
    contiguous = inputs_of(seqlen=18)
    inputs = as_columns(contiguous, width=81) if change == "odd width" else as_columns(contiguous)
    if change == "z elsewhere":
        inputs["z"] = contiguous["z"]
    if change == "transposed":
        inputs |= {name: inputs[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("x", "z")}
    if change == "rows apart":
        inputs |= {name: torch.cat([contiguous[name]] * 2, dim=1)[:, :18] for name in ("x", "z")}
    if change == "odd address":
        for name in ("x", "z"):
            moved = torch.cat([torch.zeros(1, device=DEVICE), contiguous[name].flatten()])[1:]
            inputs[name] = moved.view(contiguous[name].shape)
    readable = Inputs(*(inputs.get(name) for name in Inputs._fields)).readable()
    assert readable.x.is_contiguous()
    assert readable.z.is_contiguous()
    assert readable.x.data_ptr() % 16 == 0
    assert readable.token_stride == 32
    assert torch.equal(readable.x, contiguous["x"])


def test_fixed_angles():
    inputs = inputs_of(seqlen=18, batch=1)
    inputs["angles"] = 0.3 * torch.randn(4, device=DEVICE)
    check(inputs, chunk_size=16)


def staged(rank=1, seqlen=37, with_documents=True, with_state=True):
    """Triton's inputs and the reference's view of the same: tensors in chunks, in float64."""
    inputs = inputs_of(seqlen=seqlen, rank=rank, heads=2)
    inputs.pop("norm_weight", None)
    ids = documents(2, seqlen) if with_documents else None
    initial = torch.randn(2, 2, 16, 16, device=DEVICE) if with_state else None
    names = [name for name in Inputs._fields if name not in ("document_ids", "initial")]
    ours = Inputs(*(inputs.get(name) for name in names), ids, initial)
    sizes = Sizes.known(ours, Launch(chunk=16 // rank, heads=1))
    chunk = sizes.launch.chunk
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    scales = [
        reference._into_chunks(t, chunk) for t in reference.token_scales(wide["dt"], wide["A"], wide["trap"], ids)
    ]
    chunk_ids = None if ids is None else reference._into_chunks(ids, chunk, repeat_last=True)
    scales[0] = reference.cumsum_within_documents(scales[0], chunk_ids)
    turn = reference._into_chunks(reference.rotation_increments(wide["angles"], wide["dt"]), chunk)
    turn = reference.cumsum_within_documents(turn, chunk_ids)
    return ours, sizes, wide, scales, turn, chunk_ids


def by_token(tensor):
    """The reference's (batch, chunks, chunk, heads, …) → the kernels' (batch, heads, padded length, …)."""
    return tensor.flatten(1, 2).transpose(1, 2)


def test_buffers_start_as_nan():
    _, sizes, *_ = staged()
    assert sizes.empty(3).isnan().all()


@pytest.mark.parametrize("with_documents", [False, True])
def test_stage_token_scales(with_documents):
    ours, sizes, _, (log_decay, key_scale, diagonal), turn, _ = staged(with_documents=with_documents)
    scales = compute_scales(sizes, ours)
    assert error(scales.log_decay * math.log(2), by_token(log_decay)) < 1e-5
    assert error((scales.log_decay - scales.key_log).exp2(), by_token(key_scale)) < 1e-5
    assert error(scales.diagonal, by_token(diagonal)) < 1e-5
    angle = scales.phase.double() * 2 * math.pi
    assert (angle.cos() - by_token(turn).cos()).abs().max() < 1e-5
    assert (angle.sin() - by_token(turn).sin()).abs().max() < 1e-5


@pytest.mark.parametrize("rank", [1, 4])
def test_stages_chunk_states_and_state_passing(rank):
    ours, sizes, wide, (log_decay, key_scale, _), turn, ids = staged(rank, seqlen=21)
    b = reference._into_chunks(reference._per_head(wide["B"], wide["B_bias"], 2), sizes.launch.chunk)
    v = wide["x"].unsqueeze(3) * wide["mimo_x"] if rank > 1 else wide["x"].unsqueeze(3)
    v = reference._into_chunks(v, sizes.launch.chunk)
    b, v = (t.movedim(3, 2).flatten(3, 4) for t in (reference.rotate(b, turn.unsqueeze(-2)), v))
    expected, decay = reference.chunk_states(b, v, log_decay, key_scale, ids)
    expected_before, expected_last = reference.state_passing(expected, decay, turn, ours.initial.double())

    scales = compute_scales(sizes, ours)
    assert error(scales.chunk_decay, decay.transpose(1, 2)) < 1e-5
    last = torch.empty_like(ours.initial)
    for head in range(2):
        local = local_states(sizes, ours, scales, head)
        before = pass_states(sizes, ours, scales, local, head, last)
        assert error(local[:, :, 0], expected[:, :, head]) < 1e-5
        assert error(before[:, :-1, 0], expected_before[:, :, head]) < 1e-5
        assert error(before[:, -1, 0], expected_last[:, head]) < 1e-5
    assert error(last, expected_last) < 1e-5


def test_same_bits_twice_and_with_inputs_only():
    inputs = inputs_of(seqlen=20, batch=1)
    first, second = (run(inputs, "triton", chunk_size=16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    lean = run(inputs, "triton", chunk_size=16, keep="inputs")
    assert all(error(lean[name], first[name]) < 1e-6 for name in first)


def test_nothing_is_kept_where_no_backward_follows(monkeypatch):
    asked = []
    monkeypatch.setattr("mamba3_train.kernels.scan.scan", lambda *args: asked.append(args[-1]) or scan(*args))
    inputs = inputs_of(seqlen=5, batch=1)
    mamba3_scan(**inputs, backend="triton", chunk_size=16, keep="states")
    with torch.no_grad():
        mamba3_scan(**inputs, backend="triton", chunk_size=16, keep="states")
    assert asked == ["states", "inputs"]


def test_an_unknown_choice_of_what_is_kept_is_refused():
    with pytest.raises(ValueError, match="keep must be one of inputs, scales, states, outputs, got 'all'"):
        mamba3_scan(**inputs_of(seqlen=3, batch=1), keep="all")


def test_a_document_is_bit_for_bit_alone():
    inputs = inputs_of(seqlen=32, batch=1)
    ids = (torch.arange(32, device=DEVICE) >= 16).int().unsqueeze(0)
    packed = mamba3_scan(**inputs, document_ids=ids, backend="triton", chunk_size=16)
    other = {k: v.clone() for k, v in inputs.items()}
    for name in ("x", "B", "dt", "A", "trap", "angles"):
        other[name][:, :16] = other[name][:, :16].flip(1)
    changed = mamba3_scan(**other, document_ids=ids, backend="triton", chunk_size=16)
    assert torch.equal(packed[:, 16:], changed[:, 16:])


def test_checkpointing_gives_the_same_gradients():
    inputs = inputs_of(seqlen=20, batch=1)
    plain = run(inputs, "triton", chunk_size=16)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    y = checkpoint(lambda: mamba3_scan(**leaves, backend="triton", chunk_size=16), use_reentrant=False)
    torch.manual_seed(1)
    (y * torch.randn(y.shape, device=DEVICE)).sum().backward()
    assert all(torch.equal(tensor.grad, plain[f"d_{name}"]) for name, tensor in leaves.items())


@pytest.mark.parametrize("keep", KEEPS)
def test_operator_is_registered_right(keep):
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs_of(seqlen=5, batch=1, heads=1).items()}
    tensors = [inputs.get(name) for name in Inputs._fields]
    torch.library.opcheck(scan, (*tensors, 1e-5, 16, keep))


def test_a_second_derivative_is_refused():
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs_of(seqlen=3, batch=1, heads=1).items()}
    y = mamba3_scan(**inputs, backend="triton", chunk_size=16)
    (d_x,) = torch.autograd.grad(y.sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        d_x.sum().backward()


def test_compiles_into_one_graph():
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs_of(seqlen=18, batch=1).items()}
    expected = run(inputs, "triton", chunk_size=16)
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(
        lambda kw: mamba3_scan(**kw, backend="triton", chunk_size=16), fullgraph=True, backend=backend
    )
    y = compiled(inputs)
    assert torch.equal(y, expected["y"])
    torch.manual_seed(1)
    (y * torch.randn(y.shape, device=DEVICE)).sum().backward()
    assert torch.equal(inputs["B"].grad, expected["d_B"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.float64}, "float16, bfloat16 or float32"),
        ({"chunk_size": 24}, "power of two"),
        ({"chunk_size": 1024}, "power of two"),
    ],
)
def test_refuses_what_no_kernel_serves(change, message):
    inputs = inputs_of(seqlen=4, batch=1)
    dtype = change.pop("x", torch.float32)
    with pytest.raises(ValueError, match=message):
        mamba3_scan(**(inputs | {"x": inputs["x"].to(dtype)}), backend="triton", **change)


def test_needs_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = {name: tensor.cpu() for name, tensor in inputs_of(seqlen=4, batch=1).items()}
    with pytest.raises(ValueError, match="needs CUDA tensors, x is on cpu"):
        mamba3_scan(**inputs, backend="triton")
