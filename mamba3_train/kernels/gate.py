"""The end of the mixer inside a tile: norm of each head, gate, sum over ranks, and their gradients.

ŷ = y / rms(y) · norm_weight        out = Σ_r mimo_o_r ⊙ ŷ_r ⊙ SiLU(mimo_z_r ⊙ z)        (reference: `gate_and_merge`)
"""

import triton
import triton.language as tl

from mamba3_train.kernels.tiles import load_per_rank, load_tokens, sigmoid


@triton.jit
def weigh_gate(z, mimo_z, rank, RANK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """What the sigmoid sees: rows of z times this head's mimo_z, where there is one."""
    gate = z.to(tl.float32)
    if mimo_z is not None:
        gate *= load_per_rank(mimo_z, rank, RANK, HEAD_DIM)
    return gate


@triton.jit
def gate_rows(y, z, mimo_z, mimo_o, norm_weight, norm_eps, rank, RANK: tl.constexpr, HEAD_DIM: tl.constexpr,
              HARDWARE: tl.constexpr):  # fmt: skip
    """Norm, gate and weigh the rows of a tile, z given for each row: (rows, P) float32."""
    if norm_weight is not None:
        weight = tl.load(norm_weight + tl.arange(0, HEAD_DIM)).to(tl.float32)
        y = y * tl.rsqrt(tl.sum(y * y, axis=1) / HEAD_DIM + norm_eps)[:, None] * weight[None, :]
    if z is not None:
        gate = weigh_gate(z, mimo_z, rank, RANK, HEAD_DIM)
        y *= gate * sigmoid(gate, HARDWARE)
    if mimo_o is not None:
        y *= load_per_rank(mimo_o, rank, RANK, HEAD_DIM)
    return y


@triton.jit
def gate_rows_backward(y, d_out, z, mimo_z, mimo_o, norm_weight, norm_eps, rank, RANK: tl.constexpr,
                       HEAD_DIM: tl.constexpr, HARDWARE: tl.constexpr):  # fmt: skip
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
        gate = weigh_gate(z, mimo_z, rank, RANK, HEAD_DIM)
        squashed = sigmoid(gate, HARDWARE)
        open_gate = gate * squashed
        d_gate = d_y * normed * (squashed + open_gate * (1 - squashed))
        d_z = d_gate
        if mimo_z is not None:
            d_z = d_gate * load_per_rank(mimo_z, rank, RANK, HEAD_DIM)
            d_mimo_z = d_gate * z.to(tl.float32)
        if mimo_o is not None:
            d_mimo_o *= open_gate
        d_y *= open_gate
    if norm_weight is not None:
        d_norm = d_y * y
        d_y *= weight
        d_y = inverse_rms * (d_y - y * (tl.sum(d_y * y, axis=1) / HEAD_DIM)[:, None])
    return d_y, d_z, d_mimo_z, d_mimo_o, d_norm


@triton.jit(do_not_specialize=["seqlen", "chunks", "head_start", "heads_here"])
def gate_backward_kernel(
    y, z, mimo_z, mimo_o, d_out, d_y, d_z, d_mimo_z, d_mimo_o, seqlen, chunks, head_start, heads_here,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """From the output's gradient to y's, z's and the gate's weights'; rank 1, y (batch, seqlen, HEADS, P).

    d_y: (batch, heads_here, padded length, P); d_z like z; d_mimo_z, d_mimo_o: (batch, chunks, HEADS, P).
    """
    chunk = tl.program_id(0) // heads_here
    here = tl.program_id(0) % heads_here
    batch = tl.program_id(1).to(tl.int64)
    head = head_start + here
    token = tl.arange(0, CHUNK)
    column = tl.arange(0, HEAD_DIM)
    left = seqlen - chunk * CHUNK
    valid = token < left
    tokens = ((batch * seqlen + chunk * CHUNK) * HEADS + head) * HEAD_DIM
    kept = load_tokens(y + tokens, token, valid, HEADS, HEAD_DIM).to(tl.float32)
    by_out = load_tokens(d_out + tokens, token, valid, HEADS, HEAD_DIM).to(tl.float32)
    gate = None
    if z is not None:
        gate = load_tokens(z + tokens, token, valid, HEADS, HEAD_DIM)
    weights = head * HEAD_DIM
    by_y, by_z, by_mimo_z, by_mimo_o, _ = gate_rows_backward(
        kept, by_out, gate, None if mimo_z is None else mimo_z + weights, None if mimo_o is None else mimo_o + weights,
        None, 0.0, token, 1, HEAD_DIM, HARDWARE)  # fmt: skip
    rows = ((batch * heads_here + here) * chunks + chunk) * (CHUNK * HEAD_DIM)
    tl.store(d_y + rows + token[:, None] * HEAD_DIM + column[None, :], by_y.to(d_y.dtype.element_ty))
    if z is not None:
        to = d_z + tokens + token[:, None] * (HEADS * HEAD_DIM) + column[None, :]
        tl.store(to, by_z.to(d_z.dtype.element_ty), mask=valid[:, None])
    partial = ((batch * chunks + chunk) * HEADS + head) * HEAD_DIM + column
    if mimo_z is not None:
        tl.store(d_mimo_z + partial, tl.sum(by_mimo_z, axis=0))
    if mimo_o is not None:
        tl.store(d_mimo_o + partial, tl.sum(by_mimo_o, axis=0))
