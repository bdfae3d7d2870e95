"""The Triton scan as a PyTorch operator: shapes for torch.compile, gradients for autograd.

Importing this needs no Triton: the kernels are imported when the operator first runs.
"""

import torch

from mamba3_train.kernels.inputs import Inputs, aligned

_INPUTS = (
    "Tensor x, Tensor B, Tensor C, Tensor dt, Tensor A, Tensor? trap, Tensor? angles, Tensor? B_bias, Tensor? C_bias, "
    "Tensor? D, Tensor? z, Tensor? mimo_x, Tensor? mimo_z, Tensor? mimo_o, Tensor? norm_weight, Tensor? document_ids, "
    "Tensor? initial"
)
_COUNT = len(_INPUTS.split(","))
_DOCUMENT_IDS = 15


# log_decay, key_log, diagonal, chunk_decay, phase and y; empty where nothing is kept. Single tensors: a list of them
# would cost autograd about as much time on the host as the kernels take on the device.
_KEPT = 6


@torch.library.custom_op(
    "mamba3_train::scan",
    mutates_args=(),
    schema=f"({_INPUTS}, float norm_eps, int chunk, bool keep) -> ({', '.join(['Tensor'] * (2 + _KEPT))})",
)
def scan(*arguments):
    """Outputs, last state, and what is kept for the backward: the per-token scales and, where it pays, y.

    Inputs as `inputs.Inputs`; chunk 0 leaves its size to the table; keep False keeps nothing but the inputs.
    """
    from mamba3_train.kernels.triton_scan import scan_forward

    *tensors, norm_eps, chunk, keep = arguments
    out, last, kept = scan_forward(Inputs(*tensors).readable(), norm_eps, keep, chunk)
    kept = (*kept.scales, kept.y) if keep else [None] * _KEPT
    return out, last, *(out.new_empty(0) if tensor is None else tensor for tensor in kept)


@scan.register_fake
def _(*arguments):
    from mamba3_train.kernels.sizes import Sizes
    from mamba3_train.kernels.triton_scan import scale_shapes

    *tensors, _, chunk, keep = arguments
    inputs = Inputs(*tensors)
    x, d_state = inputs.x, inputs.B.shape[-1]
    kept = [x.new_empty(0) for _ in range(_KEPT)]
    if keep:
        sizes = Sizes.of(inputs, chunk)
        kept[:5] = [x.new_empty(shape, dtype=dtype) for shape, dtype in scale_shapes(sizes)]
        kept[5] = x.new_empty(x.shape if sizes.keeps_y(inputs) else 0)
    last = x.new_empty((x.shape[0], x.shape[2], x.shape[3], d_state), dtype=torch.float32)
    return x.new_empty(x.shape), last, *kept


@torch.library.custom_op(
    "mamba3_train::scan_backward",
    mutates_args=(),
    schema=f"(Tensor d_out, Tensor? d_last, {_INPUTS}, Tensor[] kept, float norm_eps, int chunk) -> Tensor[]",
)
def scan_backward(d_out, d_last, *arguments):
    """Gradients of the inputs that are not None, document_ids excepted, in order."""
    from mamba3_train.kernels.triton_scan import Kept, Scales, scan_backward

    *tensors, kept, norm_eps, chunk = arguments
    *scales, y = kept
    kept = Kept(Scales(*scales), y if y.numel() else None) if scales[0].numel() else None
    d_last = None if d_last is None else d_last.contiguous()
    grads = scan_backward(Inputs(*tensors).readable(), norm_eps, aligned(d_out.contiguous()), d_last, kept, chunk)
    return [grad for grad in grads if grad is not None]


@scan_backward.register_fake
def _(d_out, d_last, *arguments):
    tensors = arguments[:_COUNT]
    return [t.new_empty(t.shape) for i, t in enumerate(tensors) if t is not None and i != _DOCUMENT_IDS]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.norm_eps, ctx.chunk, _ = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.set_materialize_grads(False)  # no zeros for outputs that have no gradient


def _backward(ctx, d_out, d_last, *_):
    saved = ctx.saved_tensors  # once: reading it again would recompute a checkpointed forward again
    tensors, kept = saved[:_COUNT], saved[_COUNT:]
    if d_out is None:
        d_out = torch.zeros_like(tensors[0])
    grads = iter(scan_backward(d_out, d_last, *tensors, list(kept), ctx.norm_eps, ctx.chunk))
    ordered = [None if t is None or i == _DOCUMENT_IDS else next(grads) for i, t in enumerate(tensors)]
    return *ordered, None, None, None


scan.register_autograd(_backward, setup_context=_setup_context)
