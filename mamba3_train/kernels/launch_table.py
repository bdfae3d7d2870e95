"""The table of launch configurations: what was found to be fastest, as data that is read without Triton.

The regimes are the rows of launch_table.json, which `tools/tune_kernels.py` writes:

    "half" and "single", the portable kernels at 16 and 32 bit, and "hopper", those of `kernels.hopper`; by the largest
    d_state · head_dim they serve, of which the first that fits is taken:
    rows        of a tile
    small_rows  the same where a block has less than 128 KiB of shared memory (GPUs other than data-centre ones)
    heads       of a pass at ranks 1 and 2
    kernels     warps of single kernels, and registers a thread or null, where they are not the compiler's choice

Measured on H200 (compute capability 9.0): "half" and "hopper" of 8192, 128 · 64. The others were only run or
(small_rows) compiled; other devices run the same table.
"""

import json
from functools import cache
from pathlib import Path

WALKS = 256
"""Programs that walk at a time on Hopper, if there are heads enough: two for each multiprocessor."""

TABLE = Path(__file__).with_name("launch_table.json")


@cache
def find(gear: str, size: int) -> dict:
    """The table's row for kernels of this gear and d_state · head_dim; pairs of warps and registers as tuples."""
    rows = json.loads(TABLE.read_text())[gear]
    row = next(row for largest, row in rows.items() if size <= int(largest))
    return row | {"kernels": {kernel: tuple(options) for kernel, options in row["kernels"].items()}}


def heads_of_pass(row: dict, rank: int) -> int:
    """Heads that one pass of the backward takes, by a row of the table: fewer at higher ranks, for the same memory."""
    return max(1, row["heads"] // max(1, rank // 2))


def heads_in_pass(heads: int, groups: int, wanted: int) -> int:
    """Heads of one pass, at most `wanted` where possible: whole groups, or an equal share of one."""
    per_group = heads // groups
    if wanted < per_group:
        return max(n for n in range(1, wanted + 1) if per_group % n == 0)
    return per_group * max(n for n in range(1, groups + 1) if groups % n == 0 and n * per_group <= wanted)


def chunks_of_span(rank: int) -> int:
    """Chunks of a span, at whose start the kernels for Hopper keep the state for the backward."""
    return 32 if rank == 1 else 64
