"""Norm, gate and sum over ranks of a product on Hopper, and their gradients: see `kernels/gate.py`.

Tiles are (CHUNK, RANK, P) at any rank; z and d_out (CHUNK, 1, P), the weights (1, RANK, P).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def sigmoid(x):
    denominator = 1.0 + gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * -1.4426950408889634], gl.float32, True, 1
    )
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [denominator], gl.float32, True, 1)


@gluon.jit
def inverse_rms(y, norm_eps, HEAD_DIM: gl.constexpr):
    return gl.rsqrt(gl.sum(y * y, axis=2) / HEAD_DIM + norm_eps)[:, :, None]


@gluon.jit
def gate_rows(y, z, mimo_z, mimo_o, norm_weight, norm_eps, HEAD_DIM: gl.constexpr):
    """Norm, gate and weigh y."""
    if norm_weight is not None:
        y = y * inverse_rms(y, norm_eps, HEAD_DIM) * norm_weight
    if z is not None:
        gate = z
        if mimo_z is not None:
            gate = gate * mimo_z
        y = y * (gate * sigmoid(gate))
    if mimo_o is not None:
        y = y * mimo_o
    return y


@gluon.jit
def gate_rows_backward(y, d_out, z, mimo_z, mimo_o, norm_weight, norm_eps, HEAD_DIM: gl.constexpr):
    """Gradients of y, and each row's share of those of z, mimo_z, mimo_o and norm_weight: shaped like y, or 0.0."""
    d_z = 0.0
    d_mimo_z = 0.0
    d_mimo_o = 0.0
    d_norm = 0.0
    normed = y
    inverse = 0.0
    if norm_weight is not None:
        inverse = inverse_rms(y, norm_eps, HEAD_DIM)
        y = y * inverse
        normed = y * norm_weight
    d_y = d_out
    if mimo_o is not None:
        d_y = d_out * mimo_o
        d_mimo_o = d_out * normed
    if z is not None:
        gate = z
        if mimo_z is not None:
            gate = gate * mimo_z
        squashed = sigmoid(gate)
        open_gate = gate * squashed
        d_gate = d_y * normed * (squashed + open_gate * (1 - squashed))
        d_z = d_gate
        if mimo_z is not None:
            d_z = d_gate * mimo_z
            d_mimo_z = d_gate * z
        if mimo_o is not None:
            d_mimo_o = d_mimo_o * open_gate
        d_y = d_y * open_gate
    if norm_weight is not None:
        d_norm = d_y * y
        d_y = d_y * norm_weight
        mean = gl.sum(d_y * y, axis=2)[:, :, None] / HEAD_DIM
        d_y = inverse * (d_y - y * mean)
    return d_y, d_z, d_mimo_z, d_mimo_o, d_norm
