"""Sum per-head gradients of B or C over the heads of a group, and of their biases over tokens.

Every sum has a fixed order, so results are the same bits every time: heads inside a launch in order, launches in stream
order, tokens block by block.
"""

import triton
import triton.language as tl

TOKENS = 32


@triton.jit(do_not_specialize=["seqlen", "padded", "head_start"])
def head_sum_kernel(
    per_head, total, d_bias, seqlen, padded, head_start,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, D_STATE: tl.constexpr, STATE_BLOCK: tl.constexpr, RANK: tl.constexpr,
    HEADS_HERE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """per_head: (batch, HEADS_HERE, padded length · RANK, N); total: (batch, seqlen, RANK, GROUPS, N) float32, set by the
    first heads of a group and added to by the others; d_bias: (batch · token blocks, HEADS, RANK, N) or None.

    A program owns one rank's columns of a block of tokens, for one group.
    """
    PER_GROUP: tl.constexpr = HEADS // GROUPS
    SUMMED: tl.constexpr = HEADS_HERE if HEADS_HERE < PER_GROUP else PER_GROUP
    block = tl.program_id(0)
    rank = tl.program_id(1) % RANK
    first = tl.program_id(1) // RANK * SUMMED
    batch = tl.program_id(2).to(tl.int64)
    group = (head_start + first) // PER_GROUP
    token = block * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, STATE_BLOCK)
    known = (column < D_STATE)[None, :] & (token < seqlen)[:, None]
    at = (((batch * seqlen + token)[:, None] * RANK + rank) * GROUPS + group) * D_STATE + column[None, :]
    running = tl.load(total + at, mask=known & ((head_start + first) % PER_GROUP > 0), other=0.0)
    for i in range(SUMMED):
        start = ((batch * HEADS_HERE + first + i) * padded + block * TOKENS) * (RANK * D_STATE)
        row = tl.arange(0, TOKENS) * RANK + rank
        tile = tl.load(per_head + start + row[:, None] * D_STATE + column[None, :], mask=known, other=0.0)
        tile = tile.to(tl.float32)
        running += tile
        if d_bias is not None:
            slot = (batch * tl.num_programs(0) + block) * HEADS + head_start + first + i
            to = d_bias + (slot * RANK + rank) * D_STATE + column
            tl.store(to, tl.sum(tile, axis=0), mask=column < D_STATE)
    tl.store(total + at, running, mask=known)
