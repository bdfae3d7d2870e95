"""One token through the recurrence of all heads, the state updated in place: the kernel behind `step.mamba3_step`.

    H ← α R(−φ) [H + (1 − λ) dt Σ_r b'_r x'_rᵀ] + λ dt Σ_r b_r x_rᵀ        y_r = Hᵀ c_r + D x_r
    out = Σ_r mimo_o_r ⊙ norm(y_r) ⊙ SiLU(mimo_z_r ⊙ z)                    ': of the token before

A program owns ROWS rows of P of one head of one sequence: it reads its part of the state once and writes it once, and
everything else it needs is small. The state is two tiles, the first and the second columns of all N / 2 pairs; columns
that do not rotate are paired too (column i of their first half with column i of their second) and turned by zero.
Arithmetic is float32, in registers, whatever the state is stored in. Inference only: there is no backward.
Ranks from PRODUCTS on take decode_products.py's kernel instead, the same step on the matrix units.
"""

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba3_train.kernels.decode_products import decode_products_kernel
from mamba3_train.kernels.inputs import Inputs
from mamba3_train.kernels.launch import check_sizes, interpreted, programs_ahead, run
from mamba3_train.kernels.tiles import cosine_sine, hold, sigmoid


@triton.jit
def _pairs(D_STATE: tl.constexpr, PAIRS: tl.constexpr, PAIR_BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """The columns that each pair joins, in groups of VECTOR neighbours, and which pairs there are: (1, PAIR_BLOCK)."""
    pair = tl.arange(0, PAIR_BLOCK)[None, :]
    first = tl.where(pair < PAIRS, pair, pair + PAIRS)
    second = first + tl.where(pair < PAIRS, PAIRS, D_STATE // 2 - PAIRS)
    first = tl.max_contiguous(tl.multiple_of(first, [1, VECTOR]), [1, VECTOR])
    second = tl.max_contiguous(tl.multiple_of(second, [1, VECTOR]), [1, VECTOR])
    return first, second, pair < D_STATE // 2


@triton.jit
def _load_biased(vector, bias, first, second, inside):
    """Both tiles of one rank's B or C with its bias: (1, PAIR_BLOCK) float32 each."""
    a = tl.load(vector + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(vector + second, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        a += tl.load(bias + first, mask=inside, other=0.0)
        b += tl.load(bias + second, mask=inside, other=0.0)
    return a, b


@triton.jit
def _turn(angles, step, PAIRS: tl.constexpr, PAIR_BLOCK: tl.constexpr, FIXED_ANGLES: tl.constexpr,
          HARDWARE: tl.constexpr):  # fmt: skip
    """Cosine and sine of the token's turn: (1, PAIR_BLOCK)."""
    pair = tl.arange(0, PAIR_BLOCK)[None, :]
    angle = tl.load(angles + pair, mask=pair < PAIRS, other=0.0).to(tl.float32)
    # Radians / 2π, or π · tanh(angle) · dt / 2π.
    turns = angle * 0.15915494309189535 if FIXED_ANGLES else (sigmoid(2 * angle, HARDWARE) - 0.5) * step
    return cosine_sine(turns - tl.floor(turns + 0.5), HARDWARE)


@triton.jit
def decode_step_kernel(
    x, B, C, dt, A, trap, angles, B_bias, C_bias, D, z, mimo_x, mimo_z, mimo_o, norm_weight, ssm, B_before, x_before,
    out, norm_eps,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, D_STATE: tl.constexpr, PAIRS: tl.constexpr,
    RANK: tl.constexpr, PAIR_BLOCK: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr, TRAP_STRIDE: tl.constexpr, ANGLES_STRIDE: tl.constexpr, FIXED_ANGLES: tl.constexpr,
    HARDWARE: tl.constexpr,
):  # fmt: skip
    """Shapes as in `step.mamba3_step`; *_STRIDE: elements from one sequence's numbers to the next one's."""
    blocks: tl.constexpr = HEAD_DIM // ROWS
    head = tl.program_id(0) // blocks % HEADS
    batch = (tl.program_id(0) // (blocks * HEADS)).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    first, second, inside = _pairs(D_STATE, PAIRS, PAIR_BLOCK, VECTOR)
    state = ssm + (batch * HEADS + head) * (HEAD_DIM * D_STATE) + row[:, None] * D_STATE
    h = tl.load(state + first, mask=inside, other=0.0)
    g = tl.load(state + second, mask=inside, other=0.0)

    step = tl.load(dt + batch * HEADS + head).to(tl.float32)
    alpha = tl.exp(step * tl.load(A + batch * HEADS + head).to(tl.float32))
    column = head * HEAD_DIM + row
    current = tl.load(x + batch * TOKEN_STRIDE + column).to(tl.float32)
    shared = batch * (RANK * GROUPS) + head // (HEADS // GROUPS)  # rank 0's row of B and C; the next is GROUPS further
    weights = head * (RANK * HEAD_DIM) + row
    biases = head * (RANK * D_STATE)

    h = hold(h, HARDWARE).to(tl.float32)
    g = hold(g, HARDWARE).to(tl.float32)
    gamma = step
    if trap is not None:
        gamma = tl.sigmoid(tl.load(trap + batch * TRAP_STRIDE + head).to(tl.float32)) * step
        before = tl.load(x_before + batch * (HEADS * HEAD_DIM) + column).to(tl.float32) * (step - gamma)
        for r in range(RANK):
            value = before
            if mimo_x is not None:
                value *= tl.load(mimo_x + weights + r * HEAD_DIM)
            bias = None if B_bias is None else B_bias + biases + r * D_STATE
            a, b = _load_biased(B_before + (shared + r * GROUPS) * D_STATE, bias, first, second, inside)
            h += value[:, None] * a
            g += value[:, None] * b
    if PAIRS > 0:
        angles = angles if FIXED_ANGLES else angles + batch * ANGLES_STRIDE
        cos, sin = _turn(angles, step, PAIRS, PAIR_BLOCK, FIXED_ANGLES, HARDWARE)
        cos *= alpha
        sin *= alpha
        turned = h * cos + g * sin
        g = g * cos - h * sin
        h = turned
    else:
        h *= alpha
        g *= alpha
    for r in range(RANK):
        value = current * gamma
        if mimo_x is not None:
            value *= tl.load(mimo_x + weights + r * HEAD_DIM)
        bias = None if B_bias is None else B_bias + biases + r * D_STATE
        a, b = _load_biased(B + (shared + r * GROUPS) * D_STATE, bias, first, second, inside)
        h += value[:, None] * a
        g += value[:, None] * b

    total = tl.zeros((ROWS,), tl.float32)
    for r in range(RANK):
        bias = None if C_bias is None else C_bias + biases + r * D_STATE
        a, b = _load_biased(C + (shared + r * GROUPS) * D_STATE, bias, first, second, inside)
        y = tl.sum(h * a + g * b, axis=1)
        if D is not None:
            value = current * tl.load(D + head)
            if mimo_x is not None:
                value *= tl.load(mimo_x + weights + r * HEAD_DIM)
            y += value
        if norm_weight is not None:
            y *= tl.rsqrt(tl.sum(y * y, axis=0) / HEAD_DIM + norm_eps) * tl.load(norm_weight + column)
        if z is not None:
            gate = tl.load(z + batch * TOKEN_STRIDE + column).to(tl.float32)
            if mimo_z is not None:
                gate *= tl.load(mimo_z + weights + r * HEAD_DIM)
            y *= gate * sigmoid(gate, HARDWARE)
        if mimo_o is not None:
            y *= tl.load(mimo_o + weights + r * HEAD_DIM)
        total += y
    # Each warp has read x_before, and of a small state what several warps hold, before one of them overwrites it.
    tl.debug_barrier()
    tl.store(state + first, h.to(ssm.dtype.element_ty), mask=inside)
    tl.store(state + second, g.to(ssm.dtype.element_ty), mask=inside)
    tl.store(x_before + batch * (HEADS * HEAD_DIM) + column, current.to(x_before.dtype.element_ty))
    tl.store(out + batch * (HEADS * HEAD_DIM) + column, total.to(out.dtype.element_ty))


def decode_token(inputs: Inputs, state: tuple[Tensor, Tensor, Tensor], norm_eps: float) -> Tensor:
    """Outputs of one token, (batch, 1, H, P); ssm and x of the state, `step.StepState`'s tensors, are overwritten.

    Raises:
        ValueError: sizes or dtypes that the kernel does not serve.
    """
    trap, angles = _in_rows(inputs.trap), _in_rows(inputs.angles)
    inputs = inputs._replace(trap=None, angles=None).readable()
    batch, _, heads, head_dim = inputs.x.shape
    rank, groups, d_state = inputs.B.shape[2:]
    check_sizes(rank, head_dim, d_state, inputs.x.dtype)
    if state[0].dtype == torch.float64:
        raise ValueError("backend 'triton' takes state.ssm in float32 or bfloat16, got torch.float64")
    pairs = 0 if angles is None else angles.shape[-1]
    rows = head_dim if inputs.norm_weight is not None else min(head_dim, ROWS)
    kernel, options = (_by_products if rank >= PRODUCTS else _by_elements)(rows, d_state, pairs, inputs.x, state[0])
    out = torch.empty(inputs.x.shape, dtype=inputs.x.dtype, device=inputs.x.device)
    run(
        kernel, (batch * heads * (head_dim // rows),),
        *inputs._replace(trap=trap, angles=angles)[:15], state[0], state[1].to(inputs.B.dtype), state[2], out, norm_eps,
        HEADS=heads, GROUPS=groups, HEAD_DIM=head_dim, D_STATE=d_state, PAIRS=pairs, RANK=rank, ROWS=rows, **options,
        TOKEN_STRIDE=inputs.token_stride, TRAP_STRIDE=_stride(trap), ANGLES_STRIDE=_stride(angles),
        FIXED_ANGLES=angles is not None and angles.dim() == 1, HARDWARE=not interpreted() and torch.version.hip is None,
        num_stages=1, **({} if REGISTERS is None or interpreted() else {"maxnreg": REGISTERS}),
    )  # fmt: skip
    return out


# The least rank that goes by products; rows of P a program owns, where no norm needs them all; most registers a thread;
# by elements, elements of the state a thread has; by products, how many programs ahead to fetch the state, as a
# multiple of `programs_ahead`. As `tools/benchmark_decode.py --sweep` found them on an H200; rank 1 is 12 % faster by
# products in 32 rows, but not as exact.
PRODUCTS = 2
ROWS = 64
REGISTERS = None
ELEMENTS = 64
AHEAD = 2


def _by_elements(rows: int, d_state: int, pairs: int, x: Tensor, ssm: Tensor) -> tuple:
    """The kernel of this file and its own options."""
    pair_block = triton.next_power_of_2(d_state // 2)
    vector = gcd(gcd(pairs, d_state // 2), 16 // ssm.dtype.itemsize)
    options = {"PAIR_BLOCK": pair_block, "VECTOR": vector, "num_warps": _warps(rows, d_state, pair_block)}
    return decode_step_kernel, options


def _by_products(rows: int, d_state: int, pairs: int, x: Tensor, ssm: Tensor) -> tuple:
    """The kernel of decode_products.py and its own options."""
    return decode_products_kernel, {
        "PAIR_BLOCK": max(16, triton.next_power_of_2(pairs)),
        "REST_BLOCK": max(16, triton.next_power_of_2(d_state - 2 * pairs)),
        "VECTOR": 16 // ssm.dtype.itemsize,
        "HALVES": 1 if x.dtype == torch.float32 else 2,
        "AHEAD": 0 if interpreted() or AHEAD == 0 else AHEAD * programs_ahead(x.device),
        "num_warps": rows // 16,
    }


def _warps(rows: int, d_state: int, pair_block: int) -> int:
    """Warps of a program: with no fewer threads than a row or column is long, whose loads are then repeated in place
    rather than handed around through shared memory."""
    threads = max(rows * d_state // ELEMENTS, 2 * rows, 2 * pair_block)
    return triton.next_power_of_2(threads) // 32


def _in_rows(tensor: Tensor | None) -> Tensor | None:
    """The tensor itself, columns of the projection, if each sequence's numbers stand side by side; else a copy."""
    return tensor if tensor is None or tensor[0].is_contiguous() else tensor.contiguous()


def _stride(tensor: Tensor | None) -> int:
    """Elements from one sequence's row to the next one's."""
    if tensor is None or tensor.dim() == 1:
        return 0
    return tensor.stride(0) if tensor.shape[0] > 1 else tensor.shape[-1]
