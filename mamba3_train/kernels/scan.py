"""`mamba3_scan`: the one public scan, checked and handed to the backend that was asked for."""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from mamba3_train.kernels.documents import check_document_ids, document_ids_from_lengths
from mamba3_train.kernels.reference import ScanState, scan_chunked, scan_recurrent, state_with_look_ahead
from mamba3_train.kernels.triton_op import scan

HAS_TRITON = find_spec("triton") is not None
BACKENDS = ("auto", "reference", "recurrent", "triton")
KEEPS = ("inputs", "scales", "states", "outputs")


def mamba3_scan(
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
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    cu_seqlens: Tensor | None = None,
    document_ids: Tensor | None = None,
    initial_state: ScanState | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    backend: str = "reference",
    keep: str = "scales",
) -> Tensor | tuple[Tensor, ScanState]:
    """The Mamba-3 sequence mixing of all heads, SISO (rank 1) or MIMO; formulas in `kernels/reference.py`.

    Letters: N state width, P head width, R rank, H heads, G groups (H a multiple of G), S rotated pairs (2S ≤ N).
    Products run in the inputs' dtype (float16, bfloat16, float32, float64) with at least float32 accumulation; dt, A,
    decays, angles and states in float32 or wider.

    Args:
        x: (batch, seqlen, H, P).
        B, C: (batch, seqlen, R, G, N), after their norm, before bias and rotation. N is laid out as
            [S first halves | S second halves | unrotated].
        dt: (batch, seqlen, H), step sizes, positive.
        A: (batch, seqlen, H), negative decay rates.
        trap: (batch, seqlen, H) logits of λ; None is λ = 1 (no trapezoid).
        angles: (batch, seqlen, S) logits of the data-dependent rotation, or (S,) fixed radians a token; None is none.
        B_bias, C_bias: (H, R, N) or None.
        D: (H,) skip, or None.
        z: (batch, seqlen, H, P) gate, or None.
        mimo_x, mimo_z, mimo_o: (H, R, P); needed for R > 1 (mimo_z only with z), optional at R = 1.
        norm_weight: (H, P), weight of an RMS norm over each head's P before the gate; None for no norm.
        cu_seqlens: (documents + 1,) cumulative document lengths over the batch · seqlen tokens; state, rotation and
            the look at the token before start again at each document. See `document_ids_from_lengths`.
        document_ids: (batch, seqlen) integers, the same as one id a token: what a model passes to all its layers.
        initial_state: continues each row's first document.
        return_state: also return the state after each row's last token.
        chunk_size: tokens a chunk; changes the rounding only. None leaves it to the backend.
        backend: `reference` (chunked PyTorch, any device), `recurrent` (token by token), `triton` (CUDA), or `auto`
            (triton for CUDA tensors, else reference).
        keep: what triton keeps for the backward: its `inputs` alone, which is slowest; also the `scales` of all tokens
            and a state now and then, together less than x and z; the scales and all `states`, 2 · P · N bytes for each
            chunk of 64 / R tokens and head; or also, but for a norm, the `outputs` of all ranks before the gate, R
            times what x takes, for the least to compute again. The last two only on Hopper; else as `scales`.

    Returns:
        (batch, seqlen, H, P) in x's dtype; with return_state also a `ScanState`.

    Raises:
        ValueError: shapes, dtypes, devices or documents that do not fit together.
    """
    batch, seqlen = x.shape[:2] if x.dim() == 4 else (0, 0)
    check_inputs(x, B, C, dt, A, trap, angles, B_bias, C_bias, D, z, mimo_x, mimo_z, mimo_o, norm_weight)
    if cu_seqlens is not None:
        if document_ids is not None:
            raise ValueError("give cu_seqlens or document_ids, not both")
        document_ids = document_ids_from_lengths(cu_seqlens, batch, seqlen)
    elif document_ids is not None:
        check_document_ids(document_ids, batch, seqlen)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if keep not in KEEPS:
        raise ValueError(f"keep must be one of {', '.join(KEEPS)}, got {keep!r}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")

    tensors = (x, B, C, dt, A, trap, angles, B_bias, C_bias, D, z, mimo_x, mimo_z, mimo_o)
    options = {"norm_weight": norm_weight, "norm_eps": norm_eps, "document_ids": document_ids}
    if backend == "auto":
        backend = "triton" if x.is_cuda else "reference"
    if backend == "triton":
        keep = keep if torch.is_grad_enabled() else "inputs"
        y, last = _triton(tensors, options, initial_state, chunk_size, keep)
        return (y, ScanState(last, B[:, -1], x[:, -1])) if return_state else y
    y, state = _reference(tensors, options, initial_state, chunk_size, recurrent=backend == "recurrent")
    return (y, state) if return_state else y


def _reference(tensors, options, initial_state, chunk_size, recurrent):
    """Run the definition in float32 or wider, outside autocast, and return y in x's dtype."""
    x = tensors[0]
    dtype = torch.promote_types(x.dtype, torch.float32)

    def widen(tensor):
        return None if tensor is None else tensor.to(dtype)

    options = options | {"norm_weight": widen(options["norm_weight"])}
    if initial_state is not None:
        initial_state = ScanState(*map(widen, initial_state))
    with torch.autocast(x.device.type, enabled=False):
        if recurrent:
            y, state = scan_recurrent(*map(widen, tensors), initial_state=initial_state, **options)
        else:
            y, state = scan_chunked(
                *map(widen, tensors),
                initial_state=initial_state,
                chunk_size=chunk_size or max(64 // tensors[1].shape[2], 16),
                **options,
            )
    return y.to(x.dtype), state


def _triton(tensors, options, initial_state, chunk_size, keep):
    """Run the Triton kernels; the look-ahead into the first token is added to the incoming state out here.

    Returns y and the last state without its look-ahead: views for it would take autograd's time at every call.
    """
    x, _, _, dt, _, trap, _, B_bias, _, _, _, mimo_x, *_ = tensors
    check_triton(x)
    initial = None
    if initial_state is not None:
        with torch.autocast(x.device.type, enabled=False):
            first = [None if t is None else t[:, 0].float() for t in (dt, trap)]
            weights = [None if t is None else t.float() for t in (B_bias, mimo_x)]
            initial = state_with_look_ahead(ScanState(*(t.float() for t in initial_state)), *first, *weights)
    ids = options["document_ids"]
    ids = None if ids is None else ids.to(torch.int32)
    out, last, *_ = scan(*tensors, options["norm_weight"], ids, initial, options["norm_eps"], chunk_size or 0, keep)
    return out, last


def check_triton(x: Tensor) -> None:
    """Raise ValueError where the Triton kernels cannot run."""
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"backend 'triton' needs CUDA tensors, x is on {x.device}: use 'reference'")
    if not HAS_TRITON:
        raise ValueError("backend 'triton' needs the package triton, which is not installed: use 'reference'")


def check_inputs(x, B, C, dt, A, trap, angles, B_bias, C_bias, D, z, mimo_x, mimo_z, mimo_o, norm_weight):
    """Raise ValueError naming the first argument that does not fit, what came and what is expected."""
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"x must be (batch, seqlen, heads, head_dim), none of them 0, got {tuple(x.shape)}")
    if B.dim() != 5:
        raise ValueError(f"B must be (batch, seqlen, rank, groups, d_state), got {tuple(B.shape)}")
    batch, seqlen, heads, head_dim = x.shape
    rank, groups, d_state = B.shape[2:]
    tokens = (batch, seqlen)
    if heads % groups:
        raise ValueError(f"B has {groups} groups, which do not divide the {heads} heads of x")
    pairs = 0 if angles is None else angles.shape[-1]
    if 2 * pairs > d_state:
        raise ValueError(f"angles rotate {pairs} pairs, more than the d_state of B, {d_state}, holds")
    device, per_head, per_rank = x.device, (*tokens, heads), (heads, rank, head_dim)
    expected = {
        "B": (B, (*tokens, rank, groups, d_state)),
        "C": (C, (*tokens, rank, groups, d_state)),
        "dt": (dt, per_head),
        "A": (A, per_head),
        "trap": (trap, per_head),
        "angles": (angles, (pairs,) if angles is not None and angles.dim() == 1 else (*tokens, pairs)),
        "B_bias": (B_bias, (heads, rank, d_state)),
        "C_bias": (C_bias, (heads, rank, d_state)),
        "D": (D, (heads,)),
        "z": (z, (*tokens, heads, head_dim)),
        "mimo_x": (mimo_x, per_rank),
        "mimo_z": (mimo_z, per_rank),
        "mimo_o": (mimo_o, per_rank),
        "norm_weight": (norm_weight, (heads, head_dim)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {shape} to fit x {tuple(x.shape)}, got {tuple(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, x on {device}: put both on one device")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
    if rank > 1 and (mimo_x is None or mimo_o is None or (z is not None and mimo_z is None)):
        raise ValueError(f"rank {rank} needs mimo_x and mimo_o, and mimo_z where there is a gate z")
