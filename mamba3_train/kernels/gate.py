"""The end of the mixer inside a tile: norm of each head, gate, sum over ranks, and their gradients.

ŷ = y / rms(y) · norm_weight        out = Σ_r mimo_o_r ⊙ ŷ_r ⊙ SiLU(mimo_z_r ⊙ z)        (reference: `gate_and_merge`)
"""

import triton
import triton.language as tl

from mamba3_train.kernels.tiles import for_ranks, for_tokens, load_ranks, load_tokens, sigmoid


@triton.jit
def weigh_gate(z, mimo_z, RANK: tl.constexpr):
    """What the sigmoid sees: z (CHUNK, P) times this head's mimo_z (RANK, P), where there is one."""
    gate = for_ranks(z.to(tl.float32), RANK)
    if mimo_z is not None:
        gate = gate * for_tokens(mimo_z, RANK)
    return gate


@triton.jit
def gate_rows(y, z, mimo_z, mimo_o, norm_weight, norm_eps, RANK: tl.constexpr, HEAD_DIM: tl.constexpr,
              HARDWARE: tl.constexpr):  # fmt: skip
    """Norm, gate and weigh y, (CHUNK, P) at rank 1, else (CHUNK, RANK, P), float32; z (CHUNK, P), weights (RANK, P)."""
    if norm_weight is not None:
        y = y * inverse_rms(y, norm_eps, HEAD_DIM) * for_tokens(norm_weight, RANK)
    if z is not None:
        gate = weigh_gate(z, mimo_z, RANK)
        y *= gate * sigmoid(gate, HARDWARE)
    if mimo_o is not None:
        y *= for_tokens(mimo_o, RANK)
    return y


@triton.jit
def inverse_rms(y, norm_eps, HEAD_DIM: tl.constexpr):
    return tl.rsqrt(tl.sum(y * y, axis=len(y.shape) - 1, keep_dims=True) / HEAD_DIM + norm_eps)


@triton.jit
def gate_rows_backward(y, d_out, z, mimo_z, mimo_o, norm_weight, norm_eps, RANK: tl.constexpr, HEAD_DIM: tl.constexpr,
                       HARDWARE: tl.constexpr):  # fmt: skip
    """Gradients of y, and each row's share of those of z, mimo_z, mimo_o and norm_weight: shaped like y.

    d_out: (CHUNK, P), the output's gradient.
    """
    d_z = 0.0
    d_mimo_z = 0.0
    d_mimo_o = 0.0
    d_norm = 0.0
    normed = y
    inverse = 0.0
    if norm_weight is not None:
        weight = for_tokens(norm_weight, RANK)
        inverse = inverse_rms(y, norm_eps, HEAD_DIM)
        y *= inverse
        normed = y * weight
    d_out = for_ranks(d_out, RANK)
    d_y = d_out
    if mimo_o is not None:
        d_y = d_out * for_tokens(mimo_o, RANK)
        d_mimo_o = d_out * normed
    if z is not None:
        gate = weigh_gate(z, mimo_z, RANK)
        squashed = sigmoid(gate, HARDWARE)
        open_gate = gate * squashed
        d_gate = d_y * normed * (squashed + open_gate * (1 - squashed))
        d_z = d_gate
        if mimo_z is not None:
            d_z = d_gate * for_tokens(mimo_z, RANK)
            d_mimo_z = d_gate * for_ranks(z.to(tl.float32), RANK)
        if mimo_o is not None:
            d_mimo_o *= open_gate
        d_y *= open_gate
    if norm_weight is not None:
        d_norm = d_y * y
        d_y *= weight
        mean = tl.sum(d_y * y, axis=len(y.shape) - 1, keep_dims=True) / HEAD_DIM
        d_y = inverse * (d_y - y * mean)
    return d_y, d_z, d_mimo_z, d_mimo_o, d_norm


@triton.jit(do_not_specialize=["seqlen", "chunks", "head_start"])
def gate_backward_kernel(
    y, z, mimo_z, mimo_o, d_out, d_y, d_z, d_mimo_z, d_mimo_o, seqlen, chunks, head_start,
    HEADS: tl.constexpr, HEADS_HERE: tl.constexpr, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr,
    HARDWARE: tl.constexpr, TOKEN_STRIDE: tl.constexpr,
):  # fmt: skip
    """From the output's gradient to y's, z's and the gate's weights'; rank 1, y (batch, seqlen, HEADS, P).

    d_y: (batch, HEADS_HERE, padded length, P); d_z like z; d_mimo_z, d_mimo_o: (batch, chunks, HEADS, P).
    """
    chunk = tl.program_id(0) // HEADS_HERE
    here = tl.program_id(0) % HEADS_HERE
    batch = tl.program_id(1).to(tl.int64)
    head = head_start + here
    token = tl.arange(0, CHUNK)
    column = tl.arange(0, HEAD_DIM)
    left = seqlen - chunk * CHUNK
    start = batch * seqlen + chunk * CHUNK
    tokens = (start * HEADS + head) * HEAD_DIM
    kept = load_tokens(y + tokens, left, CHUNK, HEADS * HEAD_DIM, HEAD_DIM).to(tl.float32)
    by_out = load_tokens(d_out + tokens, left, CHUNK, HEADS * HEAD_DIM, HEAD_DIM).to(tl.float32)
    gate = None
    if z is not None:
        gate = load_tokens(z + start * TOKEN_STRIDE + head * HEAD_DIM, left, CHUNK, TOKEN_STRIDE, HEAD_DIM)
    by_y, by_z, by_mimo_z, by_mimo_o, _ = gate_rows_backward(
        kept, by_out, gate, None if mimo_z is None else load_ranks(mimo_z, head, 1, HEAD_DIM),
        None if mimo_o is None else load_ranks(mimo_o, head, 1, HEAD_DIM), None, 0.0, 1, HEAD_DIM, HARDWARE
    )  # fmt: skip
    rows = ((batch * HEADS_HERE + here) * chunks + chunk) * (CHUNK * HEAD_DIM)
    tl.store(d_y + rows + token[:, None] * HEAD_DIM + column[None, :], by_y.to(d_y.dtype.element_ty))
    if z is not None:
        to = d_z + tokens + token[:, None] * (HEADS * HEAD_DIM) + column[None, :]
        tl.store(to, by_z.to(d_z.dtype.element_ty), mask=token[:, None] < left)
    partial = ((batch * chunks + chunk) * HEADS + head) * HEAD_DIM + column
    if mimo_z is not None:
        tl.store(d_mimo_z + partial, tl.sum(by_mimo_z, axis=0))
    if mimo_o is not None:
        tl.store(d_mimo_o + partial, tl.sum(by_mimo_o, axis=0))
