"""The Triton scan, forward and backward: the kernel stages strung together on plain tensors, no autograd here.

Heads are taken in passes of `launch.heads`, so the workspace (states, per-head gradients of B and C) stays small and
close to the L2 cache. The backward keeps nothing of the forward but its inputs and recomputes states pass by pass.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from mamba3_train.kernels import (
    chunk_key,
    chunk_output,
    chunk_query,
    chunk_state,
    gate,
    head_sum,
    state_passing,
    token_scales,
)
from mamba3_train.kernels.inputs import Inputs
from mamba3_train.kernels.launch import Launch, hopper, interpreted, run
from mamba3_train.kernels.sizes import Sizes


class Scales(NamedTuple):
    """Results of `token_scales`: (batch, H, padded length) each, chunk_decay (batch, H, chunks), phase (…, S)."""

    log_decay: Tensor
    key_log: Tensor
    diagonal: Tensor
    chunk_decay: Tensor
    phase: Tensor


class Kept(NamedTuple):
    """What the forward may keep for the backward besides its inputs: less memory than x and z take.

    y: (batch, seqlen, H, P) before norm and gate, of rank 1 where there is a norm or a gate.
    """

    scales: Scales
    y: Tensor | None


def scan_forward(
    inputs: Inputs, norm_eps: float, keep: bool = False, launch: Launch | int = 0
) -> tuple[Tensor, Tensor, Kept]:
    """Outputs (batch, seqlen, H, P), the last state (batch, H, P, N) float32, and what `keep` keeps."""
    sizes = Sizes.of(inputs, launch).in_forward()
    scales = compute_scales(sizes, inputs)
    out = sizes.empty(*inputs.x.shape, dtype=sizes.dtype)
    kept_y = torch.empty_like(out) if keep and sizes.keeps_y(inputs) else None
    last = sizes.empty(sizes.batch, sizes.heads, sizes.head_dim, sizes.d_state)
    for head in sizes.passes():
        before = compute_states(sizes, inputs, scales, head, last)
        _outputs(sizes, inputs, scales, before, out, kept_y, norm_eps, head)
    return out, last, Kept(scales, kept_y)


def _outputs(sizes, inputs, scales, before, out, kept_y, norm_eps, head):
    """Stage 4: gated outputs of one pass's heads."""
    arguments = (*_rows_arguments(inputs), *scales[:3], scales.phase, before, out)
    place = (norm_eps, sizes.seqlen, sizes.chunks, head)
    options = sizes.constants(inputs) | sizes.launch.options("outputs")
    if sizes.on_hopper:
        run(hopper().chunk_output.hopper_chunk_outputs_kernel, sizes.chunk_grid(), *arguments, *place, **options)
    else:
        kernel = chunk_output.chunk_outputs_kernel
        run(kernel, sizes.chunk_grid(), *arguments, kept_y, *[None] * 6, *place, **options)


def scan_backward(
    inputs: Inputs, norm_eps: float, d_out: Tensor, d_last: Tensor | None, kept: Kept | None = None,
    launch: Launch | int = 0,
) -> Inputs:  # fmt: skip
    """Gradients of all inputs, in their own dtypes; None where the input is None (and for document_ids)."""
    sizes = Sizes.of(inputs, launch)
    kept = kept or Kept(compute_scales(sizes, inputs), None)
    batch, heads, pairs, padded, chunks = sizes.batch, sizes.heads, sizes.pairs, sizes.padded, sizes.chunks
    per_token = (batch, heads, padded)
    angle_parts = len(sizes.passes()) * triton.cdiv(sizes.heads_here, token_scales.HEAD_BLOCK)
    grads = {
        "x": sizes.empty(*inputs.x.shape, dtype=sizes.dtype),
        "z": None if inputs.z is None else sizes.empty(*inputs.z.shape, dtype=inputs.z.dtype),
        "B": sizes.empty(*inputs.B.shape), "C": sizes.empty(*inputs.C.shape),
        "initial": None if inputs.initial is None else torch.empty_like(inputs.initial),
        "dt": torch.empty_like(inputs.dt), "A": torch.empty_like(inputs.A),
        "trap": None if inputs.trap is None else torch.empty_like(inputs.trap),
        "angles": sizes.empty(angle_parts, batch, sizes.seqlen, pairs),
    }  # fmt: skip
    inner = torch.empty_like if sizes.inner_parts == sizes.passing_programs else torch.zeros_like
    scale_grads = {
        "query_inner": sizes.empty(*per_token), "key_inner": sizes.empty(*per_token),
        "d_diagonal": sizes.empty(*per_token), "d_phase": sizes.empty(batch, sizes.heads_here, padded, pairs),
        "state_inner": inner(sizes.empty(batch, heads, chunks, sizes.inner_parts)),
        "d_chunk_turn": sizes.empty(batch, heads, chunks, sizes.head_dim // state_passing.ROWS, pairs),
    }  # fmt: skip
    partial = _partial_sums(sizes, inputs)
    for head in sizes.passes():
        _backward_pass(sizes, inputs, kept, norm_eps, d_out, d_last, head, grads, scale_grads, partial)
    fixed_angles = inputs.angles is not None and inputs.angles.dim() == 1
    grads["angles"] = None if inputs.angles is None else grads["angles"].sum((0, 1, 2) if fixed_angles else 0)
    grads |= {name: None if tensor is None else tensor.sum((0, 1)) for name, tensor in partial.items()}
    grads["document_ids"] = None
    ordered = (grads[name] for name in Inputs._fields)
    return Inputs(*(g if g is None else g.to(i.dtype) for g, i in zip(ordered, inputs, strict=True)))


def compute_scales(sizes: Sizes, inputs: Inputs) -> Scales:
    """Stage 1, all heads at once."""
    scales = Scales(*(sizes.empty(*shape, dtype=dtype) for shape, dtype in scale_shapes(sizes)))
    programs, batch = _scales_grid(sizes, sizes.heads)
    run(
        token_scales.token_scales_kernel, (programs * token_scales.HEAD_SPLIT, batch),
        *_scales_arguments(inputs), *scales, sizes.seqlen, sizes.chunks, **_scales_constants(sizes, inputs),
        HEAD_SPLIT=token_scales.HEAD_SPLIT, num_warps=4,
    )  # fmt: skip
    return scales


def scale_shapes(sizes: Sizes) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shape and dtype of each of `Scales`."""
    per_token = (sizes.batch, sizes.heads, sizes.padded)
    single = torch.float32
    phase_dtype = single if sizes.dtype == single else torch.int16
    per_chunk = ((sizes.batch, sizes.heads, sizes.chunks), single)
    return *[(per_token, single)] * 3, per_chunk, ((*per_token, sizes.pairs), phase_dtype)


def compute_states(sizes: Sizes, inputs: Inputs, scales: Scales, head: int, last: Tensor) -> Tensor:
    """Stages 2 and 3 for one pass: the state before each chunk and after the last, (batch, chunks + 1, …)."""
    return pass_states(sizes, inputs, scales, local_states(sizes, inputs, scales, head), head, last)


def local_states(sizes: Sizes, inputs: Inputs, scales: Scales, head: int) -> Tensor:
    """Stage 2: what each chunk adds to the state, (batch, chunks, heads of the pass, P, N)."""
    local = sizes.state_slots(sizes.chunks)
    portable = chunk_state.chunk_states_kernel
    run(
        hopper().chunk_state.hopper_chunk_states_kernel if sizes.on_hopper else portable, sizes.chunk_grid(),
        inputs.x, inputs.mimo_x, inputs.B, inputs.B_bias, inputs.document_ids, scales.log_decay, scales.key_log,
        scales.phase, local, sizes.seqlen, sizes.chunks, head,
        **sizes.constants(inputs), **sizes.launch.options("states"),
    )  # fmt: skip
    return local


def pass_states(sizes: Sizes, inputs: Inputs, scales: Scales, local: Tensor, head: int, last: Tensor) -> Tensor:
    """Stage 3: the state before each chunk and after the last, which is also written to `last` in float32."""
    before = sizes.state_slots(sizes.chunks + 1)
    run(
        state_passing.state_passing_kernel, (sizes.passing_programs, sizes.heads_here, sizes.batch),
        local, inputs.initial, scales.chunk_decay, scales.phase, before, last, sizes.chunks, head, sizes.heads_here,
        UNROLL=2 if interpreted() else state_passing.UNROLL, **sizes.passing_constants, num_warps=1,
    )  # fmt: skip
    return before


def _backward_pass(sizes, inputs, kept, norm_eps, d_out, d_last, head, grads, scale_grads, partial):
    """All gradients of one pass's heads; those of B and C are added to the earlier passes'."""
    scales = kept.scales
    last = sizes.empty(sizes.batch, sizes.heads, sizes.head_dim, sizes.d_state)
    before = compute_states(sizes, inputs, scales, head, last)
    rows = (sizes.batch, sizes.heads_here, sizes.padded * sizes.rank)
    d_y = sizes.empty(*rows, sizes.head_dim, dtype=sizes.dtype)
    d_local, d_queries = sizes.state_slots(sizes.chunks), sizes.empty(*rows, sizes.d_state, dtype=sizes.dtype)
    gate_grads = (d_out, d_y, grads["z"], partial["mimo_z"], partial["mimo_o"])
    query_grads = (d_local, d_queries, scale_grads["d_phase"], scale_grads["query_inner"])
    place = (sizes.seqlen, sizes.chunks, head)
    constants = sizes.constants(inputs)
    _queries(sizes, inputs, kept, before, gate_grads, partial["norm_weight"], query_grads, norm_eps, place)
    _sum_heads(sizes, d_queries, grads["C"], partial["C_bias"], head)
    del d_queries, query_grads
    d_at_end = sizes.state_slots(sizes.chunks)
    d_initial = last if grads["initial"] is None else grads["initial"]
    run(
        state_passing.state_passing_backward_kernel, (sizes.passing_programs, sizes.heads_here, sizes.batch),
        d_local, d_last, before, scales.chunk_decay, scales.phase, d_at_end, d_initial, scale_grads["state_inner"],
        scale_grads["d_chunk_turn"], sizes.chunks, head, sizes.heads_here,
        INNER_PARTS=sizes.inner_parts, UNROLL=2 if interpreted() else state_passing.UNROLL_BACKWARD,
        **sizes.passing_constants, num_warps=1,
    )  # fmt: skip
    del before, d_local
    d_keys = sizes.empty(*rows, sizes.d_state, dtype=sizes.dtype)
    portable = chunk_key.chunk_keys_backward_kernel
    run(
        hopper().chunk_key.hopper_chunk_keys_backward_kernel if sizes.on_hopper else portable, sizes.chunk_grid(),
        inputs.x, inputs.B, inputs.C, inputs.B_bias, inputs.C_bias, inputs.D, inputs.mimo_x, inputs.document_ids,
        *scales[:3], scales.phase, d_at_end, d_y, grads["x"], d_keys, scale_grads["d_phase"],
        scale_grads["key_inner"], scale_grads["d_diagonal"], partial["D"], partial["mimo_x"], *place,
        **constants, **sizes.launch.options("keys"),
    )  # fmt: skip
    _sum_heads(sizes, d_keys, grads["B"], partial["B_bias"], head)
    _scales_backward(sizes, inputs, head, grads, scale_grads)


def _queries(sizes, inputs, kept, before, gate_grads, d_norm, query_grads, norm_eps, place):
    """From the output's gradient to y's, z's and the gate's weights', and on to the query side of each chunk.

    gate_grads: d_out, then the gradients of y, z, mimo_z, mimo_o; query_grads: d_local, then those of C, phase, decay.
    """
    scales, constants, grid = kept.scales, sizes.constants(inputs), sizes.chunk_grid()
    rows = (*_rows_arguments(inputs), *scales[:3], scales.phase, before)
    if sizes.on_hopper:  # all in one
        run(
            hopper().chunk_query.hopper_chunk_queries_backward_kernel, grid, *rows, *gate_grads, d_norm, *query_grads,
            norm_eps, *place, **constants, **sizes.launch.options("queries"),
        )  # fmt: skip
        return
    if kept.y is None:
        run(
            chunk_output.chunk_outputs_kernel, grid, *rows, None, None, *gate_grads, d_norm, norm_eps, *place,
            **constants, **sizes.launch.options("outputs_backward"),
        )  # fmt: skip
    else:
        run(
            gate.gate_backward_kernel, grid, kept.y, inputs.z, inputs.mimo_z, inputs.mimo_o, *gate_grads, *place,
            HEADS=sizes.heads, HEADS_HERE=sizes.heads_here, HEAD_DIM=sizes.head_dim, CHUNK=sizes.launch.chunk,
            HARDWARE=sizes.hardware, TOKEN_STRIDE=inputs.token_stride, num_warps=4,
        )  # fmt: skip
    run(
        chunk_query.chunk_queries_backward_kernel, grid,
        inputs.x, inputs.B, inputs.C, inputs.B_bias, inputs.C_bias, inputs.mimo_x, inputs.document_ids, *scales[:3],
        scales.phase, before, gate_grads[1], *query_grads, *place, **constants, **sizes.launch.options("queries"),
    )  # fmt: skip


def _sum_heads(sizes: Sizes, per_head: Tensor, total: Tensor, d_bias: Tensor | None, head: int) -> None:
    groups_here = max(1, sizes.heads_here * sizes.groups // sizes.heads)
    tile = head_sum.tile(sizes.rank)
    blocks = triton.cdiv(sizes.seqlen, tile["TOKENS"]) * triton.cdiv(sizes.d_state, tile["COLUMNS"])
    run(
        head_sum.head_sum_kernel, (blocks, sizes.rank * groups_here, sizes.batch),
        per_head, total, d_bias, sizes.seqlen, sizes.padded, head, sizes.heads_here,
        HEADS=sizes.heads, GROUPS=sizes.groups, D_STATE=sizes.d_state, RANK=sizes.rank, **tile,
    )  # fmt: skip


def _scales_backward(sizes: Sizes, inputs: Inputs, head: int, grads: dict, scale_grads: dict[str, Tensor]) -> None:
    """Gradients of dt, A, trap and, one part a pass and head block, angles."""
    names = ("key_inner", "query_inner", "d_diagonal", "d_phase", "state_inner", "d_chunk_turn")
    run(
        token_scales.token_scales_backward_kernel, _scales_grid(sizes, sizes.heads_here),
        *_scales_arguments(inputs), *(scale_grads[name] for name in names),
        *(grads[name] for name in ("dt", "A", "trap", "angles")), sizes.seqlen, sizes.chunks, head,
        **_scales_constants(sizes, inputs), HEADS_HERE=sizes.heads_here, INITIAL_STATE=inputs.initial is not None,
        INNER_PARTS=sizes.inner_parts, TURN_PARTS=sizes.head_dim // state_passing.ROWS,
        HEADS_AHEAD=token_scales.heads_ahead(sizes.pair_block), HARDWARE=sizes.hardware, num_warps=4,
    )  # fmt: skip


def _partial_sums(sizes: Sizes, inputs: Inputs) -> dict[str, Tensor | None]:
    """Buffers for gradients of per-head weights, (batch, parts, …weight's shape), summed at the end."""
    token_blocks = triton.cdiv(sizes.seqlen, head_sum.tile(sizes.rank)["TOKENS"])
    weights = {
        name: getattr(inputs, name) for name in ("B_bias", "C_bias", "D", "mimo_x", "mimo_z", "mimo_o", "norm_weight")
    }
    return {
        name: None
        if weight is None
        else sizes.empty(sizes.batch, token_blocks if "bias" in name else sizes.chunks, *weight.shape)
        for name, weight in weights.items()
    }


def _rows_arguments(inputs: Inputs) -> tuple:
    return (
        inputs.x, inputs.B, inputs.C, inputs.B_bias, inputs.C_bias, inputs.D, inputs.z, inputs.mimo_x, inputs.mimo_z,
        inputs.mimo_o, inputs.norm_weight, inputs.document_ids,
    )  # fmt: skip


def _scales_arguments(inputs: Inputs) -> tuple:
    return inputs.dt, inputs.A, inputs.trap, inputs.angles, inputs.document_ids


def _scales_grid(sizes: Sizes, heads: int) -> tuple[int, int]:
    return sizes.chunks * triton.cdiv(heads, token_scales.HEAD_BLOCK), sizes.batch


def _scales_constants(sizes: Sizes, inputs: Inputs) -> dict:
    return {
        "HEADS": sizes.heads, "PAIRS": sizes.pairs, "CHUNK": sizes.launch.chunk,
        "TOKEN_BLOCK": max(16, sizes.launch.chunk), "PAIR_BLOCK": sizes.pair_block,
        "FIXED_ANGLES": inputs.angles is not None and inputs.angles.dim() == 1, "EXACT": sizes.dtype == torch.float32,
        "HEAD_BLOCK": token_scales.HEAD_BLOCK,
    }  # fmt: skip
