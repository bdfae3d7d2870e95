"""Sum per-head gradients of B or C over the heads of a group, and of their biases over tokens.

Every sum has a fixed order, so results are the same bits every time: heads inside a launch in order, launches in stream
order, tokens block by block.
"""

import triton
import triton.language as tl


def tile(rank: int) -> dict[str, int]:
    """Sizes and warps of one program: small ones are faster, but each leaves partial sums of RANK rows of a bias."""
    if rank == 1:
        return {"TOKENS": 16, "COLUMNS": 64, "STEP": 8, "num_warps": 1}
    return {"TOKENS": 32, "COLUMNS": 64, "STEP": 4, "num_warps": 2}


@triton.jit(do_not_specialize=["seqlen", "padded", "head_start", "heads_here"])
def head_sum_kernel(
    per_head, total, d_bias, seqlen, padded, head_start, heads_here,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, D_STATE: tl.constexpr, RANK: tl.constexpr, TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """per_head: (batch, heads_here, padded length · RANK, N). total: (batch, seqlen, RANK, GROUPS, N) float32, set by
    the first heads of a group and added to by the others. d_bias: (batch · token blocks, HEADS, RANK, N) or None.

    A program owns COLUMNS columns of one rank in a block of tokens, for one group; it loads STEP heads ahead.
    """
    PER_GROUP: tl.constexpr = HEADS // GROUPS
    summed = tl.minimum(heads_here, PER_GROUP)
    blocks: tl.constexpr = (D_STATE + COLUMNS - 1) // COLUMNS
    block = tl.program_id(0) // blocks
    rank = tl.program_id(1) % RANK
    first = tl.program_id(1) // RANK * summed
    batch = tl.program_id(2).to(tl.int64)
    group = (head_start + first) // PER_GROUP
    token = block * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    known = (column < D_STATE)[None, :] & (token < seqlen)[:, None]
    at = (((batch * seqlen + token)[:, None] * RANK + rank) * GROUPS + group) * D_STATE + column[None, :]
    running = tl.load(total + at, mask=known & ((head_start + first) % PER_GROUP > 0), other=0.0)
    inside = (tl.arange(0, TOKENS) * RANK + rank)[:, None] * D_STATE + column[None, :]
    slot = (batch * (tl.num_programs(0) // blocks) + block) * HEADS + head_start + first
    for i in range(0, summed, STEP):
        tiles = ()
        for j in tl.static_range(STEP):
            start = ((batch * heads_here + first + i + j) * padded + block * TOKENS) * (RANK * D_STATE)
            tiles = tiles + (tl.load(per_head + start + inside, mask=known & (i + j < summed), other=0.0),)  # noqa: RUF005
        for j in tl.static_range(STEP):
            tile = tiles[j].to(tl.float32)
            running += tile
            if d_bias is not None:
                to = d_bias + ((slot + i + j) * RANK + rank) * D_STATE + column
                tl.store(to, tl.sum(tile, axis=0), mask=(column < D_STATE) & (i + j < summed))
    tl.store(total + at, running, mask=known)
