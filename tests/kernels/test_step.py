"""One token at a time: the step is the scan with a state, in place, in plain PyTorch and in the Triton kernel.

Without a GPU the kernel runs in the interpreter, in float32.
"""

import pytest
import torch

from mamba3_train.kernels import ScanState, StepState, mamba3_scan, mamba3_step
from mamba3_train.kernels.inputs import Inputs
from mamba3_train.kernels.step import decode_step
from tests.scan_inputs import cut, scan_inputs, scan_state

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
SMALL = {"batch": 2, "heads": 4, "head_dim": 16, "d_state": 16, "pairs": 4, "rank": 1, "groups": 1, "norm": False}
CASES = {
    "siso": {},
    "siso, two groups, norm": {"groups": 2, "norm": True},
    "siso, all rotated": {"pairs": 8},
    "siso, d_state no power of two": {"d_state": 24, "pairs": 6},
    "siso, odd number of pairs": {"d_state": 18, "pairs": 3},
    "siso, wide": {"batch": 1, "heads": 1, "head_dim": 128, "d_state": 256, "pairs": 64},
    "mimo 2": {"rank": 2, "head_dim": 32, "groups": 4},
    "mimo 4": {"rank": 4, "batch": 3, "d_state": 32, "pairs": 16},
    "mimo 4, norm": {"rank": 4, "norm": True, "groups": 2},
    "mimo 8": {"rank": 8, "heads": 2},
    "mimo 2, all rotated": {"rank": 2, "pairs": 8},
    "mimo 4, odd number of pairs": {"rank": 4, "batch": 1, "d_state": 18, "pairs": 3},
    "mimo 2, wide": {"rank": 2, "batch": 1, "heads": 1, "head_dim": 128, "d_state": 256, "pairs": 64},
}


def inputs_of(dtype=torch.float32, seqlen=1, **sizes):
    inputs = scan_inputs(seqlen=seqlen, dtype=dtype, **SMALL | sizes)
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


def state_of(inputs):
    return StepState(*(tensor.to(DEVICE) for tensor in scan_state({n: t.cpu() for n, t in inputs.items()})))


def steps(inputs, state, backend):
    """Outputs of all tokens, one after the other, and the state's buffers after them."""
    buffers = StepState.of(state)
    addresses = [tensor.data_ptr() for tensor in buffers]
    with torch.no_grad():
        outputs = [
            mamba3_step(**cut(inputs, t, t + 1), state=buffers, backend=backend) for t in range(inputs["x"].shape[1])
        ]
    assert [tensor.data_ptr() for tensor in buffers] == addresses
    return torch.cat(outputs, dim=1), buffers


# The GPU's own sine, cosine and exponential are off by up to 2⁻²⁰.
TOLERANCE = 2e-6 if DEVICE == "cpu" else 2e-5


def check(inputs, state, backend="triton", tolerance=TOLERANCE):
    """Compare with the chunked scan in float64."""
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    y, after = mamba3_scan(**wide, initial_state=ScanState(*(t.double() for t in state)), return_state=True)
    actual, buffers = steps(inputs, state, backend)
    for a, e in ((actual, y), *zip(buffers, after, strict=True)):
        assert (a.double() - e).norm() <= tolerance * e.norm()


def test_reference_steps_are_the_scan():
    inputs = inputs_of(torch.float64, seqlen=9, rank=2, groups=2, norm=True)
    check(inputs, state_of(inputs), "reference", tolerance=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_kernel_takes_one_token(case):
    inputs = inputs_of(**CASES[case])
    check(inputs, state_of(inputs))


@pytest.mark.parametrize(("case", "least_rank"), [("siso", 1), ("siso, two groups, norm", 1), ("mimo 4, norm", 8)])
def test_either_kernel_takes_any_rank(case, least_rank, monkeypatch):
    monkeypatch.setattr("mamba3_train.kernels.decode_step.PRODUCTS", least_rank)
    inputs = inputs_of(**CASES[case])
    check(inputs, state_of(inputs))


def test_products_keep_what_sixteen_bits_leave_of_B_and_C():
    """Values that float16 holds exactly, so that B plus bias is all that could be rounded on its way to the state."""
    inputs = inputs_of(rank=4)
    for name in ("x", "mimo_x"):
        inputs[name] = inputs[name].sign()
    inputs |= {"dt": torch.full_like(inputs["dt"], 0.5)} | {n: inputs[n].half() for n in ("x", "B", "C", "z", "angles")}
    del inputs["trap"]
    state = StepState.of(state_of(inputs), torch.float32)
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    y, after = mamba3_scan(**wide, initial_state=ScanState(*(t.double() for t in state)), return_state=True)
    actual, buffers = steps(inputs, state, "triton")
    assert (buffers.ssm.double() - after.ssm).norm() <= TOLERANCE * after.ssm.norm()
    assert (actual.double() - y).norm() <= 5e-4 * y.norm()


@pytest.mark.parametrize("rank", [1, 4])
def test_kernel_from_the_first_token_on(rank):
    inputs = inputs_of(seqlen=5, rank=rank, batch=1, heads=2)
    state = StepState.zeros((1, 2, 16, 16), (1, rank, 1, 16), dtype=torch.float32, device=DEVICE)
    check(inputs, state)


@pytest.mark.parametrize("missing", [("trap",), ("angles", "z"), ("B_bias",), ("C_bias", "D"), ("mimo_z", "z")])
def test_every_option_can_be_left_out(missing):
    inputs = {name: tensor for name, tensor in inputs_of(rank=2).items() if name not in missing}
    check(inputs, state_of(inputs))


def test_fixed_angles_and_large_turns():
    inputs = inputs_of()
    check(inputs | {"angles": 20 * torch.randn(4, device=DEVICE)}, state_of(inputs))
    check(inputs | {"dt": 30 + inputs["dt"], "A": 0.01 * inputs["A"]}, state_of(inputs), tolerance=1e-5)


def test_slices_of_a_projection_are_taken_as_they_are():
    inputs = inputs_of()
    state = state_of(inputs)
    whole = torch.cat([inputs[name].flatten(2) for name in ("z", "x", "trap", "angles")], dim=-1)
    z, x, trap, angles = whole.split([64, 64, 4, 4], dim=-1)
    sliced = inputs | {"z": z.unflatten(-1, (4, 16)), "x": x.unflatten(-1, (4, 16)), "trap": trap, "angles": angles}
    readable = Inputs(*(sliced.get(name) for name in Inputs._fields)).readable()
    assert (readable.x.data_ptr(), readable.z.data_ptr()) == (x.data_ptr(), z.data_ptr())
    assert torch.equal(steps(sliced, state, "triton")[0], steps(inputs, state, "triton")[0])


def test_a_bfloat16_state_is_rounded_once_a_token():
    inputs = inputs_of(rank=2)
    state = StepState.of(state_of(inputs), torch.bfloat16)
    assert (state.ssm.dtype, state.B.dtype) == (torch.bfloat16, torch.float32)
    exact = state._replace(ssm=state.ssm.float())
    y, after = steps(inputs, state, "triton")
    expected, exactly = steps(inputs, exact, "triton")
    if DEVICE == "cuda":  # the two are compiled apart, and need not add in the same order
        assert (y - expected).norm() < 1e-6 * expected.norm()
        rounding = (after.ssm.float() - exactly.ssm).abs() / exactly.ssm.abs()
        assert rounding.max() < 1.01 * 2**-8  # half the distance of two neighbours
    else:
        assert torch.equal(y, expected)
        # The interpreter cuts the last 16 bits off.
        assert torch.equal(after.ssm.float(), (exactly.ssm.view(torch.int32) & -(2**16)).view(torch.float32))


def test_operator_is_registered_right():
    inputs = inputs_of(batch=1, heads=1)
    tensors = [inputs.get(name) for name in Inputs._fields[:15]]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(decode_step, (*tensors, *state_of(inputs), 1e-5), test_utils=tests)


def test_mistakes_are_named():
    inputs = inputs_of()
    state = state_of(inputs)
    with pytest.raises(ValueError, match="no gradient"):
        mamba3_step(**inputs | {"x": inputs["x"].requires_grad_()}, state=state)
    inputs["x"] = inputs["x"].detach()
    with pytest.raises(ValueError, match="one token a sequence, x has seqlen 2"):
        mamba3_step(**inputs_of(seqlen=2), state=state)
    with pytest.raises(ValueError, match=r"state.B must be \(2, 1, 1, 16\)"):
        mamba3_step(**inputs, state=state._replace(B=state.B[:1]))
    with pytest.raises(ValueError, match=r"state.x is not contiguous.*StepState.of"):
        mamba3_step(**inputs, state=state._replace(x=state.x.transpose(1, 2).contiguous().transpose(1, 2)))
    with pytest.raises(ValueError, match="float32 or bfloat16, got"):
        mamba3_step(**inputs, state=state._replace(ssm=state.ssm.half()))
    with pytest.raises(ValueError, match=r"ranks \(1, 2, 4, 8\), got 3"):
        mamba3_step(**inputs_of(rank=3), state=state_of(inputs_of(rank=3)), backend="triton")
