"""The Triton scan as a PyTorch operator: shapes for torch.compile, gradients for autograd.

Importing this needs no Triton: the kernels are imported when the operator first runs. The operators are given to the
dispatcher directly, because at every call `torch.library.custom_op` takes the host longer than all of a forward's
launches.
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


# log_decay, key_log, diagonal, chunk_decay, phase, y, states and chunk_states; empty where nothing is kept. Single
# tensors: a list of them would cost autograd about as much time on the host as the kernels take on the device.
_KEPT = 8

_library = torch.library.Library("mamba3_train", "FRAGMENT")


def _operator(schema: str, kernel, fake):
    """Define an operator: `kernel` runs it on any device, `fake` gives its results' shapes.

    It reads tensors as they lie (`Inputs.readable`): the compiler need not copy them to where an eager call has them.
    """
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
    name = schema.partition("(")[0]
    _library.impl(name, torch._disable_dynamo(kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"mamba3_train::{name}", fake, lib=_library)
    return getattr(torch.ops.mamba3_train, name).default


def _scan(*arguments):
    """Outputs, last state, and what is kept for the backward besides the inputs.

    Inputs as `inputs.Inputs`; chunk 0 leaves its size to the table; keep as in `mamba3_scan`.
    """
    from mamba3_train.kernels.triton_scan import scan_forward

    *tensors, norm_eps, chunk, keep = arguments
    out, last, kept = scan_forward(Inputs(*tensors).readable(), norm_eps, keep, chunk)
    kept = [None] * _KEPT if keep == "inputs" else (*kept.scales, *kept[1:])
    return out, last, *(out.new_empty(0) if tensor is None else tensor for tensor in kept)


def _scan_shapes(*arguments):
    from mamba3_train.kernels.sizes import Sizes
    from mamba3_train.kernels.triton_scan import scale_shapes

    *tensors, _, chunk, keep = arguments
    inputs = Inputs(*tensors)
    x, d_state = inputs.x, inputs.B.shape[-1]
    kept = [x.new_empty(0) for _ in range(_KEPT)]
    if keep != "inputs":
        sizes = Sizes.of(inputs, chunk).keeping(keep)
        kept[:5] = [x.new_empty(shape, dtype=dtype) for shape, dtype in scale_shapes(sizes)]
        kept[5] = x.new_empty(sizes.kept_y if sizes.keeps_y else 0)
        if sizes.keeps_states:
            kept[7] = x.new_empty(sizes.all_states)
        elif sizes.on_hopper:
            kept[6] = x.new_empty(sizes.kept_states, dtype=torch.float32)
    last = x.new_empty((x.shape[0], x.shape[2], x.shape[3], d_state), dtype=torch.float32)
    return x.new_empty(x.shape), last, *kept


def _scan_backward(d_out, d_last, *arguments):
    """Gradients of the inputs that are not None, document_ids excepted, in order."""
    from mamba3_train.kernels.triton_scan import Kept, Scales, scan_backward

    *tensors, kept, norm_eps, chunk = arguments
    scales, others = Scales(*kept[:5]), (tensor if tensor.numel() else None for tensor in kept[5:])
    kept = Kept(scales, *others) if scales[0].numel() else None
    d_last = None if d_last is None else aligned(d_last.contiguous())
    grads = scan_backward(Inputs(*tensors).readable(), norm_eps, aligned(d_out.contiguous()), d_last, kept, chunk)
    return [grad for grad in grads if grad is not None]


def _scan_backward_shapes(d_out, d_last, *arguments):
    tensors = arguments[:_COUNT]
    return [t.new_empty(t.shape) for i, t in enumerate(tensors) if t is not None and i != _DOCUMENT_IDS]


scan = _operator(
    f"scan({_INPUTS}, float norm_eps, int chunk, str keep) -> ({', '.join(['Tensor'] * (2 + _KEPT))})",
    _scan, _scan_shapes,
)  # fmt: skip
scan_backward = _operator(
    f"scan_backward(Tensor d_out, Tensor? d_last, {_INPUTS}, Tensor[] kept, float norm_eps, int chunk) -> Tensor[]",
    _scan_backward, _scan_backward_shapes,
)  # fmt: skip


def _below_autograd(operator, *arguments):
    """What follows autograd in the dispatcher: modes that look at operators, then the kernel."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        output = _below_autograd(scan, *arguments)
        *tensors, ctx.norm_eps, ctx.chunk, _ = arguments
        ctx.save_for_backward(*tensors, *output[2:])
        ctx.set_materialize_grads(False)  # no zeros for outputs that have no gradient
        return output

    @staticmethod
    def backward(ctx, d_out, d_last, *_):
        saved = ctx.saved_tensors  # once: reading it again would recompute a checkpointed forward again
        tensors, kept = saved[:_COUNT], saved[_COUNT:]
        if d_out is None:
            d_out = torch.zeros_like(tensors[0])
        arguments = (d_out, d_last, *tensors, list(kept), ctx.norm_eps, ctx.chunk)
        # Autograd has to see it where a graph of the gradients is wanted, to refuse their derivatives.
        wanted = torch.is_grad_enabled()
        grads = iter(scan_backward(*arguments) if wanted else _below_autograd(scan_backward, *arguments))
        ordered = [None if t is None or i == _DOCUMENT_IDS else next(grads) for i, t in enumerate(tensors)]
        return *ordered, None, None, None


@torch._disable_dynamo  # where a graph breaks before it, the compiler is not to look into a call
def _with_gradient(*arguments):
    return _Differentiable.apply(*arguments) if torch.is_grad_enabled() else _below_autograd(scan, *arguments)


_library.impl("scan", _with_gradient, "Autograd")


def _second_derivative(ctx, *_):
    raise RuntimeError("backend 'triton' has no second derivative: use 'reference'")


torch.library.register_autograd("mamba3_train::scan_backward", _second_derivative, lib=_library)
