"""The Triton scan, forward and backward: the kernel stages strung together on plain tensors, no autograd here.

Heads are taken in passes of `launch.heads`, so the workspace (states, per-head gradients of B and C) stays small and
close to the L2 cache. The backward computes most states again, pass by pass.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mamba3_train.kernels import (
    chunk_key,
    chunk_output,
    chunk_query,
    chunk_state,
    gate,
    head_sum,
    state_passing,
    state_walks,
    token_scales,
)
from mamba3_train.kernels.inputs import Inputs
from mamba3_train.kernels.launch import Launch, hopper
from mamba3_train.kernels.side_stream import SideStream
from mamba3_train.kernels.sizes import Sizes


class Scales(NamedTuple):
    """Results of `token_scales`: (batch, H, padded length) each, chunk_decay (batch, H, chunks), phase (…, S)."""

    log_decay: Tensor
    key_log: Tensor
    diagonal: Tensor
    chunk_decay: Tensor
    phase: Tensor


class Kept(NamedTuple):
    """What the forward may keep for the backward besides its inputs.

    y: before norm and gate where there is a gate, `Sizes.kept_y`. states: those of `state_walks`; with the scales and y
    of rank 1 less memory than x and z take. chunk_states, instead of them: (batch, chunks + 1, H, P, N), before each
    chunk and after the last.
    """

    scales: Scales
    y: Tensor | None = None
    states: Tensor | None = None
    chunk_states: Tensor | None = None


def scan_forward(
    inputs: Inputs, norm_eps: float, keep: str = "inputs", launch: Launch | int = 0
) -> tuple[Tensor, Tensor, Kept]:
    """Outputs (batch, seqlen, H, P), the last state (batch, H, P, N) float32, and what is kept: see `mamba3_scan`."""
    sizes = Sizes.known(inputs, launch)
    sizes = sizes.in_forward if keep == "inputs" else sizes.in_training
    sizes = sizes.keeping(keep)
    scales = compute_scales(sizes, inputs)
    out = sizes.empty(*inputs.x.shape, dtype=sizes.dtype)
    kept_y = sizes.empty(*sizes.kept_y, dtype=sizes.dtype) if sizes.keeps_y else None
    last = sizes.empty(sizes.batch, sizes.heads, sizes.head_dim, sizes.d_state)
    starts = states = None
    if sizes.on_hopper:
        starts, states = state_walks.starting_states(sizes, inputs, scales, keep == "scales")
    all_states = sizes.empty(*sizes.all_states, dtype=sizes.dtype) if sizes.keeps_states else None
    for head in sizes.passes:
        if sizes.on_hopper:
            before = sizes.state_slots(sizes.chunks + 1) if all_states is None else all_states[:, :, head:]
            state_walks.walk(sizes, inputs, scales, head, starts, before, states, last)
        else:
            before = compute_states(sizes, inputs, scales, head, last)
        _outputs(sizes, inputs, scales, before, out, kept_y, norm_eps, head)
    return out, last, Kept(scales, kept_y, states, all_states)


def _outputs(sizes, inputs, scales, before, out, kept_y, norm_eps, head):
    """Stage 4: gated outputs of one pass's heads."""
    arguments = (*_rows_arguments(inputs), *scales[:3], scales.phase, before)
    place = (norm_eps, sizes.seqlen, sizes.chunks, head)
    launch = sizes.on_chunks["outputs"]
    if sizes.on_hopper:
        launch(hopper().chunk_output.hopper_chunk_outputs_kernel, *arguments, kept_y, out, *place)
    else:
        launch(chunk_output.chunk_outputs_kernel, *arguments, out, kept_y, *[None] * 6, *place)


def scan_backward(
    inputs: Inputs, norm_eps: float, d_out: Tensor, d_last: Tensor | None, kept: Kept | None = None,
    launch: Launch | int = 0,
) -> Inputs:  # fmt: skip
    """Gradients of all inputs, in their own dtypes; None where the input is None (and for document_ids)."""
    sizes = Sizes.known(inputs, launch)
    kept = kept or Kept(compute_scales(sizes, inputs))
    if kept.chunk_states is not None:
        sizes = sizes.keeping("states" if kept.y is None else "outputs")
    elif sizes.on_hopper and kept.states is None:
        kept = kept._replace(states=state_walks.span_states(sizes, inputs, kept.scales, sizes.spans))
    batch, heads, pairs, padded, chunks = sizes.batch, sizes.heads, sizes.pairs, sizes.padded, sizes.chunks
    per_token = (batch, heads, padded)
    angle_parts = len(sizes.passes) * sizes.head_blocks
    grads = {
        "x": sizes.empty(*inputs.x.shape, dtype=sizes.dtype),
        "z": None if inputs.z is None else sizes.empty(*inputs.z.shape, dtype=inputs.z.dtype),
        "B": sizes.empty(*inputs.B.shape), "C": sizes.empty(*inputs.C.shape),
        "initial": None if inputs.initial is None else torch.empty_like(inputs.initial),
        "dt": torch.empty_like(inputs.dt), "A": torch.empty_like(inputs.A),
        "trap": None if inputs.trap is None else torch.empty_like(inputs.trap),
        "angles": sizes.empty(angle_parts, batch, sizes.seqlen, pairs),
    }  # fmt: skip
    scale_grads = {
        "query_inner": sizes.empty(*per_token), "key_inner": sizes.empty(*per_token),
        "d_diagonal": sizes.empty(*per_token), "d_phase": sizes.empty(*sizes.phase_grads),
        "state_inner": sizes.empty(batch, heads, chunks, sizes.inner_parts),
        "d_chunk_turn": sizes.empty(batch, heads, chunks, sizes.turn_parts, pairs),
    }  # fmt: skip
    if sizes.inner_parts > sizes.passing_programs:
        scale_grads["state_inner"].zero_()
    partial = _partial_sums(sizes, inputs)
    # Sums over heads and the scales' backward, which wait for memory, run beside walks.
    aside = SideStream(sizes.device if sizes.on_hopper and sizes.device.type == "cuda" else None)
    for head in sizes.passes:
        _backward_pass(sizes, inputs, kept, norm_eps, d_out, d_last, head, grads, scale_grads, partial, aside)
    if sizes.keeps_states:
        with aside.beside():
            _scales_backward(sizes, inputs, head, grads, scale_grads)
    biases = [partial.pop(name) for name in ("B_bias", "C_bias")]  # which run beside, too
    grads |= {name: _summed(tensor) for name, tensor in partial.items()}
    aside.join()
    over = (0, 1, 2) if sizes.fixed_angles else 0
    grads["angles"] = None if inputs.angles is None else grads["angles"].sum(over)
    grads |= {"B_bias": _summed(biases[0]), "C_bias": _summed(biases[1])}
    grads["document_ids"] = None
    ordered = (grads[name] for name in Inputs._fields)
    return Inputs(*(g if g is None or g.dtype == t else g.to(t) for g, t in zip(ordered, sizes.types, strict=True)))


def compute_scales(sizes: Sizes, inputs: Inputs) -> Scales:
    """Stage 1, all heads at once."""
    scales = Scales(*(sizes.empty(*shape, dtype=dtype) for shape, dtype in scale_shapes(sizes)))
    kernel = token_scales.token_scales_kernel
    sizes.scales(kernel, *_scales_arguments(inputs), *scales, sizes.seqlen, sizes.chunks)
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
    sizes.on_chunks["states"](
        chunk_state.chunk_states_kernel,
        inputs.x, inputs.mimo_x, inputs.B, inputs.B_bias, inputs.document_ids, scales.log_decay, scales.key_log,
        scales.phase, local, sizes.seqlen, sizes.chunks, head,
    )  # fmt: skip
    return local


def pass_states(sizes: Sizes, inputs: Inputs, scales: Scales, local: Tensor, head: int, last: Tensor) -> Tensor:
    """Stage 3: the state before each chunk and after the last, which is also written to `last` in float32."""
    before = sizes.state_slots(sizes.chunks + 1)
    sizes.passing(
        state_passing.state_passing_kernel,
        local, inputs.initial, scales.chunk_decay, scales.phase, before, last, sizes.chunks, head, sizes.heads_here,
    )  # fmt: skip
    return before


def _backward_pass(sizes, inputs, kept, norm_eps, d_out, d_last, head, grads, scale_grads, partial, aside):
    """All gradients of one pass's heads; those of B and C are added to the earlier passes'."""
    scales = kept.scales
    if kept.chunk_states is not None:
        before = kept.chunk_states[:, :, head:]
    elif sizes.on_hopper:
        before = state_walks.walk_spans(sizes, inputs, scales, head, kept.states)
    else:
        last = sizes.empty(sizes.batch, sizes.heads, sizes.head_dim, sizes.d_state)
        before = compute_states(sizes, inputs, scales, head, last)
    aside.join()
    rows = (sizes.batch, sizes.heads_here, sizes.padded * sizes.rank)
    d_y = sizes.empty(*rows, sizes.head_dim, dtype=sizes.dtype)
    d_local = None if sizes.on_hopper else sizes.state_slots(sizes.chunks)
    d_queries = sizes.empty(*rows, sizes.d_state, dtype=sizes.dtype)
    gate_grads = (d_out, d_y, grads["z"], partial["mimo_z"], partial["mimo_o"])
    d_phase = scale_grads["d_phase"][sizes.phase_slot(head)]
    query_grads = (d_queries, d_phase, scale_grads["query_inner"])
    place = (sizes.seqlen, sizes.chunks, head)
    _queries(sizes, inputs, kept, before, gate_grads, partial["norm_weight"], d_local, query_grads, norm_eps, place)
    with aside.beside(d_queries):
        _sum_heads(sizes, d_queries, grads["C"], partial["C_bias"], head)
        if sizes.keeps_states and head:  # there is no other walk that the pass before could have put it beside
            _scales_backward(sizes, inputs, head - sizes.heads_here, grads, scale_grads)
    del d_queries, query_grads
    if sizes.on_hopper:
        # In the states' place, unless they are not ours to overwrite.
        d_at_end = before if kept.chunk_states is None else sizes.state_slots(sizes.chunks + 1)
        ends = d_last, grads["initial"]
        state_walks.walk_back(sizes, inputs, scales, head, d_y, before, d_at_end, *ends, scale_grads)
    else:
        d_at_end = sizes.state_slots(sizes.chunks)
        d_initial = last if grads["initial"] is None else grads["initial"]
        sizes.passing_backward(
            state_passing.state_passing_backward_kernel,
            d_local, d_last, before, scales.chunk_decay, scales.phase, d_at_end, d_initial, scale_grads["state_inner"],
            scale_grads["d_chunk_turn"], sizes.chunks, head, sizes.heads_here,
        )  # fmt: skip
    aside.join()
    del before, d_local
    d_keys = sizes.empty(*rows, sizes.d_state, dtype=sizes.dtype)
    portable = chunk_key.chunk_keys_backward_kernel
    sizes.on_chunks["keys"](
        hopper().chunk_key.hopper_chunk_keys_backward_kernel if sizes.on_hopper else portable,
        inputs.x, inputs.B, inputs.C, inputs.B_bias, inputs.C_bias, inputs.D, inputs.mimo_x, inputs.document_ids,
        *scales[:3], scales.phase, d_at_end, d_y, grads["x"], d_keys, d_phase,
        scale_grads["key_inner"], scale_grads["d_diagonal"], partial["D"], partial["mimo_x"], *place,
    )  # fmt: skip
    with aside.beside(d_keys):
        _sum_heads(sizes, d_keys, grads["B"], partial["B_bias"], head)
        if not sizes.keeps_states:
            _scales_backward(sizes, inputs, head, grads, scale_grads)


def _queries(sizes, inputs, kept, before, gate_grads, d_norm, d_local, query_grads, norm_eps, place):
    """From the output's gradient to y's, z's and the gate's weights', and on to the query side of each chunk.

    gate_grads: d_out, then the gradients of y, z, mimo_z, mimo_o; query_grads: of C, phase and decay;
    d_local: see `state_passing`, None on Hopper.
    """
    scales, queries = kept.scales, sizes.on_chunks["queries"]
    rows = (*_rows_arguments(inputs), *scales[:3], scales.phase, before)
    if sizes.on_hopper:  # all in one
        kernel = hopper().chunk_query.hopper_chunk_queries_backward_kernel
        queries(kernel, *rows, kept.y, *gate_grads, d_norm, *query_grads, norm_eps, *place)
        return
    if kept.y is None:
        outputs = sizes.on_chunks["outputs_backward"]
        outputs(chunk_output.chunk_outputs_kernel, *rows, None, None, *gate_grads, d_norm, norm_eps, *place)
    else:
        gated = (inputs.z, inputs.mimo_z, inputs.mimo_o)
        sizes.gate_backward(gate.gate_backward_kernel, kept.y, *gated, *gate_grads, *place)
    queries(
        chunk_query.chunk_queries_backward_kernel,
        inputs.x, inputs.B, inputs.C, inputs.B_bias, inputs.C_bias, inputs.mimo_x, inputs.document_ids, *scales[:3],
        scales.phase, before, gate_grads[1], d_local, *query_grads, *place,
    )  # fmt: skip


def _sum_heads(sizes: Sizes, per_head: Tensor, total: Tensor, d_bias: Tensor | None, head: int) -> None:
    kernel = head_sum.head_sum_kernel
    sizes.head_sums(kernel, per_head, total, d_bias, sizes.seqlen, sizes.padded, head, sizes.heads_here)


def _scales_backward(sizes: Sizes, inputs: Inputs, head: int, grads: dict, scale_grads: dict[str, Tensor]) -> None:
    """Gradients of dt, A, trap and, one part a pass and head block, angles."""
    given = scale_grads | {"d_phase": scale_grads["d_phase"][sizes.phase_slot(head)]}
    names = ("key_inner", "query_inner", "d_diagonal", "d_phase", "state_inner", "d_chunk_turn")
    sizes.scales_backward(
        token_scales.token_scales_backward_kernel,
        *_scales_arguments(inputs), *(given[name] for name in names),
        *(grads[name] for name in ("dt", "A", "trap", "angles")), sizes.seqlen, sizes.chunks, head,
    )  # fmt: skip


def _summed(partial: Tensor | None) -> Tensor | None:
    """The gradient of a per-head weight from its parts."""
    return None if partial is None else partial.sum((0, 1))


def _partial_sums(sizes: Sizes, inputs: Inputs) -> dict[str, Tensor | None]:
    """Buffers for gradients of per-head weights, (batch, parts, …weight's shape), summed at the end."""
    weights = {
        name: getattr(inputs, name) for name in ("B_bias", "C_bias", "D", "mimo_x", "mimo_z", "mimo_o", "norm_weight")
    }
    blocks, warps = sizes.token_blocks, sizes.launch.keys[0] if sizes.on_hopper else 1
    parts = {"B_bias": blocks, "C_bias": blocks, "D": sizes.chunks * warps}
    return {
        name: None if weight is None else sizes.empty(sizes.batch, parts.get(name, sizes.chunks), *weight.shape)
        for name, weight in weights.items()
    }


def _rows_arguments(inputs: Inputs) -> tuple:
    return (
        inputs.x, inputs.B, inputs.C, inputs.B_bias, inputs.C_bias, inputs.D, inputs.z, inputs.mimo_x, inputs.mimo_z,
        inputs.mimo_o, inputs.norm_weight, inputs.document_ids,
    )  # fmt: skip


def _scales_arguments(inputs: Inputs) -> tuple:
    return inputs.dt, inputs.A, inputs.trap, inputs.angles, inputs.document_ids
