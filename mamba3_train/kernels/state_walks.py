"""How chunks' states and their gradients come about on Hopper: by walks along whole sequences or spans of chunks.

A walk is a chain, so many are needed at a time. Where batch and heads are enough, whole sequences are walked; otherwise
parts of them at once, from what `span_sums` says that each span adds and `span_passing` hands on. The forward keeps the
state before every span, from which the backward computes states again: (batch, H, spans, P, N) float32, of all heads.
"""

from torch import Tensor

from mamba3_train.kernels import span_passing
from mamba3_train.kernels.inputs import Inputs
from mamba3_train.kernels.launch import hopper
from mamba3_train.kernels.sizes import Sizes


def starting_states(sizes: Sizes, inputs: Inputs, scales, keep: bool) -> tuple[Tensor | None, Tensor | None]:
    """What the forward's walks begin with, and the place for the spans' states, None if they are not to be kept."""
    if sizes.walks_whole:
        starts = inputs.initial
    else:
        starts = span_states(sizes, inputs, scales, sizes.spans - (sizes.spans - 1) % sizes.spans_of_walk)
        if sizes.spans_of_walk == 1:
            return starts, starts if keep else None
    return starts, sizes.empty(*sizes.kept_states) if keep else None


def span_states(sizes: Sizes, inputs: Inputs, scales, spans: int) -> Tensor:
    """The state before each of the first spans."""
    sizes = sizes.of_all_heads
    values = (inputs.x, inputs.mimo_x, inputs.B, inputs.B_bias, inputs.document_ids, scales.key_log)
    states, decay, turn = _span_sums(sizes, scales, values, 0, spans, back=False)
    _pass_spans(sizes, states, inputs.initial, decay, turn, 0, backward=False)
    return states


def walk(
    sizes: Sizes, inputs: Inputs, scales, head: int, starts: Tensor | None, before: Tensor, kept: Tensor | None,
    last: Tensor,
) -> None:  # fmt: skip
    """Fill before, (batch, chunks + 1, heads, P, N), with the states of a pass of the forward.

    starts, kept: of `starting_states`. last: (batch, H, P, N) float32, takes the state after the sequence.
    """
    length = sizes.spans_of_walk * sizes.span
    _walk(sizes.walk, sizes, inputs, scales, head, starts, before, kept, last, length)


def walk_spans(sizes: Sizes, inputs: Inputs, scales, head: int, states: Tensor) -> Tensor:
    """The states of a pass of the backward, (batch, chunks + 1, heads, P, N), from those of the spans."""
    before = sizes.state_slots(sizes.chunks + 1)
    _walk(sizes.walk_spans, sizes, inputs, scales, head, states, before, None, None, sizes.span)
    return before


def walk_back(
    sizes: Sizes, inputs: Inputs, scales, head: int, d_y: Tensor, states: Tensor, d_states: Tensor,
    d_last: Tensor | None, d_initial: Tensor | None, scale_grads: dict[str, Tensor],
) -> None:  # fmt: skip
    """Fill d_states, (batch, chunks + 1, …), with the gradients of all states but the first, which they may replace;
    those by decay and turn are in scale_grads."""
    kernel = hopper().gradient_walk.hopper_gradient_walk_kernel
    rows = (inputs.C, inputs.C_bias, d_y, inputs.document_ids, scales.log_decay, scales.chunk_decay, scales.phase)
    found = (d_initial, scale_grads["state_inner"], scale_grads["d_chunk_turn"])
    starts, length = d_last, sizes.chunks
    if not sizes.walks_back_whole:
        values = (d_y, None, inputs.C, inputs.C_bias, inputs.document_ids, scales.log_decay)
        starts, decay, turn = _span_sums(sizes, scales, values, head, sizes.spans, back=True)
        _pass_spans(sizes, starts, d_last, decay, turn, head, backward=True)
        length = sizes.span
    sizes.walk_back(kernel, *rows, states, d_states, starts, *found, length, sizes.seqlen, sizes.chunks, head)


def _walk(launch, sizes, inputs, scales, head, starts, before, kept, last, length):
    launch(
        hopper().state_walk.hopper_state_walk_kernel,
        inputs.x, inputs.mimo_x, inputs.B, inputs.B_bias, inputs.document_ids, scales.log_decay, scales.key_log,
        scales.chunk_decay, scales.phase, starts, before, kept, last, length, sizes.seqlen, sizes.chunks, head,
    )  # fmt: skip


def _span_sums(sizes, scales, values, head, count, back) -> tuple[Tensor, Tensor, Tensor]:
    """What each of the first spans adds to the state of a pass's heads, or of all to its gradient, its whole decay, and
    its whole turn; not of the last, or going back of the first.
    """
    spans = (sizes.batch, sizes.heads_here, count)
    found = (
        sizes.empty(*spans, sizes.head_dim, sizes.d_state),
        sizes.empty(*spans),
        sizes.empty(*spans, sizes.pairs, dtype=scales.phase.dtype),
    )
    if count > 1:
        sizes.span_sums(count, back)(
            hopper().span_sums.hopper_span_sums_kernel,
            *values, scales.log_decay, scales.chunk_decay, scales.phase, *found, sizes.seqlen, sizes.chunks, head,
        )  # fmt: skip
    return found


def _pass_spans(sizes, states, first, decay, turn, head, backward):
    kernel = span_passing.span_passing_kernel
    sizes.span_passing[backward](kernel, states, first, decay, turn, states.shape[2], head)
