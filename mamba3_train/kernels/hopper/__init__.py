"""The chunk kernels once more, for Hopper: in Gluon, Triton's lower level, with layouts and waits set by hand.

They compute what the portable kernels beside this package do, for the sizes that `launch.runs_on_hopper` tells.
"""

from mamba3_train.kernels.hopper import chunk_key, chunk_output, chunk_query, gradient_walk, span_sums, state_walk

__all__ = ["CONSTANTS", "chunk_key", "chunk_output", "chunk_query", "gradient_walk", "span_sums", "state_walk"]

CONSTANTS = (
    "HEADS", "HEADS_HERE", "GROUPS", "HEAD_DIM", "D_STATE", "PAIRS", "RANK", "CHUNK", "TOKEN_STRIDE", "AHEAD",
)  # fmt: skip
