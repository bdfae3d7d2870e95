"""What each chunk adds to the state at its end, on Hopper: see `kernels/chunk_state.py`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, warpgroup_mma_wait

from mamba3_train.kernels.hopper.layouts import row_layout
from mamba3_train.kernels.hopper.memory import (
    copy_bias,
    copy_tile,
    copy_weights,
    fetch_chunk_ahead,
    load_by_token,
    load_parts,
    place_of_program,
    store_parts,
)
from mamba3_train.kernels.hopper.tiles import (
    decay_to_end,
    dot_from_state,
    hold,
    share_turned,
    share_values,
    turn_of,
)


@gluon.jit(do_not_specialize=["seqlen", "chunks", "head_start"])
def hopper_chunk_states_kernel(
    x, mimo_x, B, B_bias, document_ids, log_decay, key_log, phase, states, seqlen, chunks, head_start,
    HEADS: gl.constexpr, HEADS_HERE: gl.constexpr, GROUPS: gl.constexpr, HEAD_DIM: gl.constexpr,
    D_STATE: gl.constexpr, PAIRS: gl.constexpr, RANK: gl.constexpr, CHUNK: gl.constexpr,
    TOKEN_STRIDE: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """states: (batch, chunks, HEADS_HERE, P, N)."""
    STRIDE: gl.constexpr = GROUPS * D_STATE
    REST: gl.constexpr = D_STATE - 2 * PAIRS
    pairs: gl.constexpr = row_layout(PAIRS, RANK)
    chunk, here, batch, head, start, left, scalars, keys = place_of_program(
        seqlen, chunks, head_start, HEADS, HEADS_HERE, GROUPS, D_STATE, RANK, CHUNK
    )
    ids = None if document_ids is None else document_ids + start

    k0, k1, k2 = load_parts(B + keys, left, STRIDE, CHUNK, RANK, PAIRS, REST)
    fraction = load_by_token(phase + scalars * PAIRS, PAIRS, CHUNK, PAIRS, pairs)
    b0, b1, b2 = copy_bias(B_bias, head, RANK, PAIRS, REST)
    raw = copy_tile(x + start * TOKEN_STRIDE + head * HEAD_DIM, left, CHUNK, TOKEN_STRIDE, HEAD_DIM)
    weight_x = None
    if mimo_x is not None:
        weight_x = copy_weights(mimo_x + head * (RANK * HEAD_DIM), HEAD_DIM, RANK, HEAD_DIM, False)
    async_copy.commit_group()
    scale = decay_to_end(log_decay + scalars, key_log + scalars, ids, left, CHUNK, pairs)[:, None, None]
    rest_scale = None
    if REST > 0:
        rests: gl.constexpr = row_layout(REST, RANK)
        rest_scale = decay_to_end(log_decay + scalars, key_log + scalars, ids, left, CHUNK, rests)[:, None, None]
    fetch_chunk_ahead(
        None, None, phase, x, None, seqlen, chunks, head_start, chunks,
        HEADS, HEADS_HERE, HEAD_DIM, D_STATE, PAIRS, RANK, CHUNK, TOKEN_STRIDE, AHEAD,
    )  # fmt: skip
    async_copy.wait_group(0)
    cos, sin = turn_of(hold(fraction, True))
    k0, k1, k2 = share_turned(k0, k1, k2, b0, b1, b2, cos * scale, sin * scale, rest_scale, B_bias is not None,
                              CHUNK, RANK, PAIRS, REST)  # fmt: skip
    v = share_values(raw, weight_x, CHUNK, RANK, HEAD_DIM)
    fence_async_shared()
    # [P, rows] @ [rows, N] -> [P, N]
    s0, s1, s2 = dot_from_state(v.permute((1, 0)), k0, k1, k2, PAIRS, REST)
    s0, s1 = warpgroup_mma_wait(0, [s0, s1, v, k0, k1])[:2]
    k0.store(s0.to(k0.dtype))
    k1.store(s1.to(k1.dtype))
    if REST > 0:
        k2.store(warpgroup_mma_wait(0, [s2]).to(k2.dtype))
    local = states + ((batch * chunks + chunk) * HEADS_HERE + here) * (HEAD_DIM * D_STATE)
    store_parts(local, k0, k1, k2, PAIRS, REST)
