"""The Triton scan as a PyTorch operator: shapes for torch.compile, gradients for autograd.

Importing this needs no Triton: the kernels are imported when the operator first runs.
"""

import torch

_INPUTS = (
    "Tensor x, Tensor B, Tensor C, Tensor dt, Tensor A, Tensor? trap, Tensor? angles, Tensor? B_bias, Tensor? C_bias, "
    "Tensor? D, Tensor? z, Tensor? mimo_x, Tensor? mimo_z, Tensor? mimo_o, Tensor? norm_weight, Tensor? document_ids, "
    "Tensor? initial"
)
_COUNT = len(_INPUTS.split(","))
_DOCUMENT_IDS = 15


@torch.library.custom_op(
    "mamba3_train::scan",
    mutates_args=(),
    schema=f"({_INPUTS}, float norm_eps, int chunk, bool keep) -> (Tensor, Tensor, Tensor[])",
)
def scan(*arguments):
    """Outputs, last state, and what is kept for the backward: the per-token scales and, at rank 1, y.

    Inputs as `triton_scan.Inputs`; chunk 0 leaves its size to the table; keep False keeps nothing but the inputs.
    """
    from mamba3_train.kernels.triton_scan import scan_forward

    *tensors, norm_eps, chunk, keep = arguments
    out, last, kept = scan_forward(_contiguous(tensors), norm_eps, keep, chunk)
    return out, last, [*kept.scales, *([] if kept.y is None else [kept.y])] if keep else []


@scan.register_fake
def _(*arguments):
    from mamba3_train.kernels.triton_scan import Inputs, Sizes, keeps_y, scale_shapes

    *tensors, _, chunk, keep = arguments
    inputs = Inputs(*tensors)
    x, d_state = inputs.x, inputs.B.shape[-1]
    kept = []
    if keep:
        kept = [x.new_empty(shape, dtype=dtype) for shape, dtype in scale_shapes(Sizes.of(inputs, chunk))]
        kept += [x.new_empty(x.shape)] if keeps_y(inputs) else []
    last = x.new_empty((x.shape[0], x.shape[2], x.shape[3], d_state), dtype=torch.float32)
    return x.new_empty(x.shape), last, kept


@torch.library.custom_op(
    "mamba3_train::scan_backward",
    mutates_args=(),
    schema=f"(Tensor d_out, Tensor? d_last, {_INPUTS}, Tensor[] kept, float norm_eps, int chunk) -> Tensor[]",
)
def scan_backward(d_out, d_last, *arguments):
    """Gradients of the inputs that are not None, document_ids excepted, in order."""
    from mamba3_train.kernels.triton_scan import Kept, Scales, scan_backward

    *tensors, kept, norm_eps, chunk = arguments
    if kept:
        kept = Kept(Scales(*kept[:5]), kept[5] if len(kept) > 5 else None)
    d_last = None if d_last is None else d_last.contiguous()
    grads = scan_backward(_contiguous(tensors), norm_eps, d_out.contiguous(), d_last, kept or None, chunk)
    return [grad for grad in grads if grad is not None]


@scan_backward.register_fake
def _(d_out, d_last, *arguments):
    tensors = arguments[:_COUNT]
    return [t.new_empty(t.shape) for i, t in enumerate(tensors) if t is not None and i != _DOCUMENT_IDS]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.norm_eps, ctx.chunk, _ = inputs
    ctx.save_for_backward(*tensors, *output[2])
    ctx.set_materialize_grads(False)  # no zeros for outputs that have no gradient


def _backward(ctx, d_out, d_last, _):
    saved = ctx.saved_tensors  # once: reading it again would recompute a checkpointed forward again
    tensors, kept = saved[:_COUNT], saved[_COUNT:]
    if d_out is None:
        d_out = torch.zeros_like(tensors[0])
    grads = iter(scan_backward(d_out, d_last, *tensors, list(kept), ctx.norm_eps, ctx.chunk))
    ordered = [None if t is None or i == _DOCUMENT_IDS else next(grads) for i, t in enumerate(tensors)]
    return *ordered, None, None, None


scan.register_autograd(_backward, setup_context=_setup_context)


def _contiguous(tensors):
    from mamba3_train.kernels.triton_scan import Inputs

    return Inputs(*(None if tensor is None else tensor.contiguous() for tensor in tensors))
