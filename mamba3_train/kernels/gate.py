"""The end of the mixer inside a tile: norm of each head, gate, sum over ranks, and their gradients.

    ŷ = y / rms(y) · norm_weight        out = Σ_r mimo_o_r ⊙ ŷ_r ⊙ SiLU(mimo_z_r ⊙ z)        (reference: `gate_and_merge`)
"""

import triton
import triton.language as tl

from mamba3_train.kernels.tiles import load_per_rank


@triton.jit
def load_gate(z, mimo_z, row_offset, valid, rank, RANK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """z of each row, and what the sigmoid sees: z times this head's mimo_z."""
    column = tl.arange(0, HEAD_DIM)
    gate = tl.load(z + row_offset[:, None] + column[None, :], mask=valid[:, None], other=0.0).to(tl.float32)
    scaled = gate
    if mimo_z is not None:
        scaled = gate * load_per_rank(mimo_z, rank, RANK, HEAD_DIM)
    return gate, scaled


@triton.jit
def gate_rows(y, z, mimo_z, mimo_o, norm_weight, norm_eps, row_offset, valid, rank, RANK: tl.constexpr,
              HEAD_DIM: tl.constexpr):  # fmt: skip
    """Norm, gate and weigh the rows of a tile: (rows, P) float32."""
    if norm_weight is not None:
        weight = tl.load(norm_weight + tl.arange(0, HEAD_DIM)).to(tl.float32)
        y = y * tl.rsqrt(tl.sum(y * y, axis=1) / HEAD_DIM + norm_eps)[:, None] * weight[None, :]
    if z is not None:
        _, gate = load_gate(z, mimo_z, row_offset, valid, rank, RANK, HEAD_DIM)
        y *= gate * tl.sigmoid(gate)
    if mimo_o is not None:
        y *= load_per_rank(mimo_o, rank, RANK, HEAD_DIM)
    return y


@triton.jit
def gate_rows_backward(y, d_out, z, mimo_z, mimo_o, norm_weight, norm_eps, row_offset, valid, rank,
                       RANK: tl.constexpr, HEAD_DIM: tl.constexpr):  # fmt: skip
    """Gradients of the rows y, and each row's share of those of z, mimo_z, mimo_o and norm_weight: (rows, P) each.

    d_out: (rows, P), the output's gradient repeated for every rank.
    """
    d_z = 0.0
    d_mimo_z = 0.0
    d_mimo_o = 0.0
    d_norm = 0.0
    normed = y
    inverse_rms = 0.0
    if norm_weight is not None:
        weight = tl.load(norm_weight + tl.arange(0, HEAD_DIM)).to(tl.float32)[None, :]
        inverse_rms = tl.rsqrt(tl.sum(y * y, axis=1) / HEAD_DIM + norm_eps)[:, None]
        y *= inverse_rms
        normed = y * weight
    d_y = d_out
    if mimo_o is not None:
        d_y = d_out * load_per_rank(mimo_o, rank, RANK, HEAD_DIM)
        d_mimo_o = d_out * normed
    if z is not None:
        raw, gate = load_gate(z, mimo_z, row_offset, valid, rank, RANK, HEAD_DIM)
        sigmoid = tl.sigmoid(gate)
        open_gate = gate * sigmoid
        d_gate = d_y * normed * (sigmoid + open_gate * (1 - sigmoid))
        d_z = d_gate
        if mimo_z is not None:
            d_z = d_gate * load_per_rank(mimo_z, rank, RANK, HEAD_DIM)
            d_mimo_z = d_gate * raw
        if mimo_o is not None:
            d_mimo_o *= open_gate
        d_y *= open_gate
    if norm_weight is not None:
        d_norm = d_y * y
        d_y *= weight
        d_y = inverse_rms * (d_y - y * (tl.sum(d_y * y, axis=1) / HEAD_DIM)[:, None])
    return d_y, d_z, d_mimo_z, d_mimo_o, d_norm
