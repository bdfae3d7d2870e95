"""How chunks' states and their gradients come about on Hopper: by walks along whole sequences or spans of chunks.

A walk is a chain, so many are needed at a time. Where batch and heads are enough, whole sequences are walked, and the
forward keeps the state before every span; otherwise all spans are walked at once, from what `span_sums` says that each
adds and `span_passing` hands on. The backward computes states again from those of the spans: `states`, (batch, H,
spans, P, N) float32, of all heads.
"""

from torch import Tensor

from mamba3_train.kernels import span_passing
from mamba3_train.kernels.inputs import Inputs
from mamba3_train.kernels.launch import hopper
from mamba3_train.kernels.sizes import Sizes


def starting_states(sizes: Sizes, inputs: Inputs, scales, keep: bool) -> Tensor | None:
    """The spans' states; before walks along whole sequences only the place for them, if kept."""
    if sizes.walks_whole:
        return sizes.empty(*sizes.kept_states) if keep else None
    return span_states(sizes, inputs, scales)


def span_states(sizes: Sizes, inputs: Inputs, scales) -> Tensor:
    """The state before each span."""
    sizes = sizes.of_all_heads
    values = (inputs.x, inputs.mimo_x, inputs.B, inputs.B_bias, inputs.document_ids, scales.key_log)
    states, decay, turn = _span_sums(sizes, scales, values, 0, back=False)
    _pass_spans(sizes, states, inputs.initial, decay, turn, 0, backward=False)
    return states


def walk(sizes: Sizes, inputs: Inputs, scales, head: int, states: Tensor | None, last: Tensor) -> Tensor:
    """The state before each chunk and after the last, (batch, chunks + 1, heads, P, N), of a pass of the forward.

    last: (batch, H, P, N) float32, takes the state after the sequence.
    """
    if not sizes.walks_whole:
        return walk_spans(sizes, inputs, scales, head, states, last)
    before = sizes.state_slots(sizes.chunks + 1)
    _walk(sizes.walk_whole, sizes, inputs, scales, head, inputs.initial, before, states, last)
    return before


def walk_spans(sizes: Sizes, inputs: Inputs, scales, head: int, states: Tensor, last: Tensor | None = None) -> Tensor:
    """The same from the spans' states, of any pass."""
    before = sizes.state_slots(sizes.chunks + 1)
    _walk(sizes.walk_spans, sizes, inputs, scales, head, states, before, last=last)
    return before


def walk_back(
    sizes: Sizes, inputs: Inputs, scales, head: int, d_y: Tensor, states: Tensor, d_last: Tensor | None,
    d_initial: Tensor | None, scale_grads: dict[str, Tensor],
) -> None:  # fmt: skip
    """Replace every state but the first, (batch, chunks + 1, …), by its gradient; those by decay and turn are in
    scale_grads."""
    kernel = hopper().gradient_walk.hopper_gradient_walk_kernel
    walk_whole, walk_spans = sizes.walk_back
    rows = (inputs.C, inputs.C_bias, d_y, inputs.document_ids, scales.log_decay, scales.chunk_decay, scales.phase)
    place = (sizes.seqlen, sizes.chunks, head)
    found = (d_initial, scale_grads["state_inner"], scale_grads["d_chunk_turn"])
    if sizes.walks_back_whole:
        walk_whole(kernel, *rows, states, d_last, *found, *place)
        return
    values = (d_y, None, inputs.C, inputs.C_bias, inputs.document_ids, scales.log_decay)
    d_states, decay, turn = _span_sums(sizes, scales, values, head, back=True)
    _pass_spans(sizes, d_states, d_last, decay, turn, head, backward=True)
    walk_spans(kernel, *rows, states, d_states, *found, *place)


def _walk(launch, sizes, inputs, scales, head, starts, before, kept=None, last=None):
    launch(
        hopper().state_walk.hopper_state_walk_kernel,
        inputs.x, inputs.mimo_x, inputs.B, inputs.B_bias, inputs.document_ids, scales.log_decay, scales.key_log,
        scales.chunk_decay, scales.phase, starts, before, kept, last, sizes.seqlen, sizes.chunks, head,
    )  # fmt: skip


def _span_sums(sizes, scales, values, head, back) -> tuple[Tensor, Tensor, Tensor]:
    """What each span adds to the state of a pass's heads, or to its gradient, its whole decay, and its whole turn.

    Not of the last span, or going back of the first.
    """
    spans = (sizes.batch, sizes.heads_here, sizes.spans)
    found = (
        sizes.empty(*spans, sizes.head_dim, sizes.d_state),
        sizes.empty(*spans),
        sizes.empty(*spans, sizes.pairs, dtype=scales.phase.dtype),
    )
    if sizes.spans > 1:
        sizes.span_sums[back](
            hopper().span_sums.hopper_span_sums_kernel,
            *values, scales.log_decay, scales.chunk_decay, scales.phase, *found, sizes.seqlen, sizes.chunks, head,
        )  # fmt: skip
    return found


def _pass_spans(sizes, states, first, decay, turn, head, backward):
    kernel = span_passing.span_passing_kernel
    sizes.span_passing[backward](kernel, states, first, decay, turn, sizes.spans, head)
