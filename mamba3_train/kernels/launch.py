"""How the kernels are launched: tile sizes, warps and heads a pass for each regime, and what is refused.

One configuration a regime, no tuning at run time: every rank and every run computes the same bits. `tools/tune_kernels.py`
measures candidates. Measured on H200 (compute capability 9.0); other devices run the same table, unmeasured.
"""

from typing import NamedTuple

import torch
import triton


class Launch(NamedTuple):
    """One regime's configuration.

    chunk: tokens between two states in memory; tile: tokens of one matrix product (tile · rank rows); heads: heads of
    one pass, which bounds the workspace and keeps it near the L2 cache; warps of the three chunk kernels.
    """

    chunk: int
    tile: int
    heads: int = 16
    states_warps: int = 4
    outputs_warps: int = 4
    outputs_backward_warps: int = 4
    keys_backward_warps: int = 4


# (largest d_state · head_dim, rank) of 16-bit inputs; the first row that holds both is taken.
HALF = {
    (128 * 64, 1): Launch(chunk=64, tile=64),
    (128 * 64, 2): Launch(chunk=64, tile=32),
    (128 * 64, 4): Launch(chunk=64, tile=16, heads=8),
    (128 * 64, 8): Launch(chunk=32, tile=8, heads=8),
    (256 * 128, 1): Launch(chunk=32, tile=32, heads=8),
    (256 * 128, 2): Launch(chunk=32, tile=16, heads=8),
    (256 * 128, 4): Launch(chunk=32, tile=8, heads=4),
    (256 * 128, 8): Launch(chunk=16, tile=4, heads=4),
}
# Single precision: half the rows a tile, twice the bytes a number.
SINGLE = {
    (128 * 64, 1): Launch(chunk=32, tile=32, heads=8),
    (128 * 64, 2): Launch(chunk=32, tile=16, heads=8),
    (128 * 64, 4): Launch(chunk=32, tile=8, heads=4),
    (128 * 64, 8): Launch(chunk=16, tile=4, heads=4),
    (256 * 128, 1): Launch(chunk=16, tile=16, heads=4),
    (256 * 128, 2): Launch(chunk=16, tile=8, heads=4),
    (256 * 128, 4): Launch(chunk=16, tile=4, heads=4),
    (256 * 128, 8): Launch(chunk=16, tile=2, heads=4),
}
RANKS, HEAD_DIMS = (1, 2, 4, 8), (16, 32, 64, 128)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def choose(rank: int, head_dim: int, d_state: int, dtype: torch.dtype) -> Launch:
    """The configuration for these sizes.

    Raises:
        ValueError: sizes or a dtype that no kernel serves.
    """
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"backend 'triton' takes x in float16, bfloat16 or float32, got {dtype}: use 'reference'")
    if interpreted() and dtype == torch.bfloat16:
        raise ValueError("Triton's interpreter computes bfloat16 wrongly: use float32 there")
    if rank not in RANKS:
        raise ValueError(f"backend 'triton' takes ranks {RANKS}, got {rank}: use 'reference'")
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"backend 'triton' takes head_dim {HEAD_DIMS}, got {head_dim}: use 'reference'")
    if d_state % 2 or not 16 <= d_state <= 256:
        raise ValueError(f"backend 'triton' takes an even d_state from 16 to 256, got {d_state}: use 'reference'")
    table = SINGLE if dtype == torch.float32 else HALF
    return next(launch for (size, r), launch in table.items() if r == rank and d_state * head_dim <= size)


def heads_in_pass(heads: int, groups: int, wanted: int) -> int:
    """Heads of one pass, at most `wanted` where possible: whole groups, or an equal share of one."""
    per_group = heads // groups
    if wanted < per_group:
        return max(n for n in range(1, wanted + 1) if per_group % n == 0)
    return per_group * max(n for n in range(1, groups + 1) if groups % n == 0 and n * per_group <= wanted)
