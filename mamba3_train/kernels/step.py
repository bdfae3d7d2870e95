"""`mamba3_step`: one more token of every sequence, the state updated in place; what decoding calls.

Importing this needs no Triton: the kernel is imported when it first runs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mamba3_train.kernels.inputs import Inputs
from mamba3_train.kernels.reference import ScanState
from mamba3_train.kernels.scan import BACKENDS, check_inputs, check_triton, mamba3_scan

STATE_DTYPES = (torch.float64, torch.float32, torch.bfloat16)


class StepState(NamedTuple):
    """A `ScanState` in memory of its own, which every step overwrites: the same shapes, contiguous.

    ssm: (batch, heads, head_dim, d_state), float32 or, for half the traffic, bfloat16 (what it costs: docs/kernels.md).
    B: (batch, rank, groups, d_state). x: (batch, heads, head_dim).
    """

    ssm: Tensor
    B: Tensor
    x: Tensor

    @classmethod
    def of(cls, state: ScanState, ssm_dtype: torch.dtype | None = None) -> "StepState":
        """A copy of what a scan returned, with ssm in another dtype if one is given."""
        copies = cls(*(tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in state))
        return copies if ssm_dtype is None else copies._replace(ssm=copies.ssm.to(ssm_dtype))

    @classmethod
    def zeros(cls, ssm_shape, B_shape, *, ssm_dtype=torch.float32, dtype, device=None) -> "StepState":
        """The state before the first token; dtype is that of x and B."""
        ssm, B = (
            torch.zeros(ssm_shape, dtype=ssm_dtype, device=device),
            torch.zeros(B_shape, dtype=dtype, device=device),
        )
        return cls(ssm, B, torch.zeros(ssm_shape[:-1], dtype=dtype, device=device))


def mamba3_step(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    A: Tensor,
    trap: Tensor | None = None,
    angles: Tensor | None = None,
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    mimo_x: Tensor | None = None,
    mimo_z: Tensor | None = None,
    mimo_o: Tensor | None = None,
    *,
    state: StepState,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    backend: str = "reference",
) -> Tensor:
    """What `mamba3_scan` does with one token and an initial state, except that the state's own tensors are overwritten.

    No memory grows and nothing waits for the device, so a CUDA graph can replay it. Inference only.

    Args:
        x, …, mimo_o, norm_weight, norm_eps: as in `mamba3_scan`, seqlen 1.
        state: `StepState.zeros` before the first token, `StepState.of` after a scan.
        backend: as in `mamba3_scan`.

    Returns:
        (batch, 1, H, P) in x's dtype.

    Raises:
        ValueError: shapes, dtypes, devices or a state that do not fit together, or a gradient is wanted.
    """
    tensors = (x, B, C, dt, A, trap, angles, B_bias, C_bias, D, z, mimo_x, mimo_z, mimo_o)
    check_inputs(*tensors, norm_weight)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*tensors, norm_weight, *state)):
        raise ValueError("mamba3_step has no gradient: call it under torch.no_grad(), or use mamba3_scan")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    _check_state(state, x, B)
    if backend == "auto":
        backend = "triton" if x.is_cuda else "reference"
    if backend == "triton":
        check_triton(x)
        return decode_step(*tensors, norm_weight, *state, norm_eps)
    options = {"norm_weight": norm_weight, "norm_eps": norm_eps, "backend": backend}
    y, after = mamba3_scan(*tensors, **options, initial_state=ScanState(*state), return_state=True)
    for buffer, tensor in zip(state, after, strict=True):
        buffer.copy_(tensor)
    return y


_TOKEN = (
    "Tensor x, Tensor B, Tensor C, Tensor dt, Tensor A, Tensor? trap, Tensor? angles, Tensor? B_bias, Tensor? C_bias, "
    "Tensor? D, Tensor? z, Tensor? mimo_x, Tensor? mimo_z, Tensor? mimo_o, Tensor? norm_weight"
)


@torch.library.custom_op(
    "mamba3_train::decode_step",
    mutates_args=("ssm", "B_before", "x_before"),
    schema=f"({_TOKEN}, Tensor(a!) ssm, Tensor(b!) B_before, Tensor(c!) x_before, float norm_eps) -> Tensor",
)
def decode_step(*arguments):
    """The Triton kernel as an operator: outputs (batch, 1, H, P); the three tensors of the state are overwritten."""
    from mamba3_train.kernels.decode_step import decode_token

    *tensors, ssm, B_before, x_before, norm_eps = arguments
    inputs = Inputs(*tensors, document_ids=None, initial=None)
    out = decode_token(inputs, (ssm, B_before, x_before), norm_eps)
    # Not the kernel's business: all heads of a group read the token before's B, so none may overwrite it.
    B_before.copy_(inputs.B.squeeze(1))
    return out


@decode_step.register_fake
def _(*arguments):
    return torch.empty_like(arguments[0], memory_format=torch.contiguous_format)


def _check_state(state: StepState, x: Tensor, B: Tensor) -> None:
    if x.shape[1] != 1:
        raise ValueError(f"mamba3_step takes one token a sequence, x has seqlen {x.shape[1]}: use mamba3_scan")
    batch, _, heads, head_dim = x.shape
    expected = {"ssm": (batch, heads, head_dim, B.shape[-1]), "B": (batch, *B.shape[2:]), "x": (batch, heads, head_dim)}
    for name, shape in expected.items():
        tensor = getattr(state, name)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"state.{name} must be {shape} to fit x {tuple(x.shape)}, got {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"state.{name} is on {tensor.device}, x on {x.device}: put both on one device")
        if not tensor.is_contiguous():
            raise ValueError(f"state.{name} is not contiguous: copy the scan's state by StepState.of")
    if state.ssm.dtype not in STATE_DTYPES:
        raise ValueError(f"state.ssm must be float32 or bfloat16, got {state.ssm.dtype}")
