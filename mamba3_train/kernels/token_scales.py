"""Per-token scales of every head: log decay, key scale, diagonal scale and rotation phase, summed along each chunk.

    log_decay_t = Σ_{s ≤ t} dt_s A_s · log2(e)          key_log_t = log_decay_t − log2(f_t)
    f_t = λ_t dt_t + (1 − λ_{t+1}) dt_{t+1}             diagonal_t = λ_t dt_t
    phase_t = Σ_{s ≤ t} tanh(angles_s) dt_s / 2         (in turns; fixed angles: angles / 2π a token)

Sums run over the tokens of t's document inside t's chunk (reference: `token_scales`, `cumsum_within_documents`). They
are products with a 0/1 matrix: the same code with and without documents, and another document's tokens enter as exact
zeros. Logs are base 2, so that the other kernels use exp2 directly. Everything is (batch, heads, padded length), the
length padded to whole chunks; padding has f = diagonal = 0 and the last log decay and phase, and so changes nothing.
"""

import triton
import triton.language as tl

from mamba3_train.kernels.tiles import hold

HEAD_BLOCK = 16
HEAD_SPLIT = 4  # programs that share the rotation of a block's heads


def heads_ahead(pair_block: int) -> int:
    """How many heads' gradients by phase are in flight together: as many as take 72 KiB of shared memory."""
    return max(1, 128 // pair_block)


@triton.jit
def _inside_document(document_ids, batch_start, token, seqlen, DOCUMENTS: tl.constexpr):
    """1 where a chunk's column token comes no later than its row token and in the same document: (tokens, tokens)."""
    inside = token[:, None] >= token[None, :]
    if DOCUMENTS:
        row = tl.load(document_ids + batch_start + tl.minimum(token, seqlen - 1))
        inside &= row[:, None] == tl.load(document_ids + batch_start + tl.minimum(token, seqlen - 1))[None, :]
    return tl.where(inside, 1.0, 0.0)


@triton.jit
def _sum(summing, values, EXACT: tl.constexpr):
    """[tokens, tokens] 0/1 matrix @ [tokens, columns], to float32's precision or to 2⁻¹⁶, enough for 16-bit inputs."""
    if EXACT:
        return tl.dot(summing, values, input_precision="tf32x3")
    else:
        high = values.to(tl.bfloat16)
        low = (values - high.to(tl.float32)).to(tl.bfloat16)
        narrow = summing.to(tl.bfloat16)
        return tl.dot(narrow, low, tl.dot(narrow, high))


@triton.jit
def _same_document(document_ids, batch_start, token, other, seqlen, DOCUMENTS: tl.constexpr):
    """Whether two tokens of a row, both inside it after clamping, belong to one document."""
    if DOCUMENTS:
        last = seqlen - 1
        here = tl.load(document_ids + batch_start + tl.minimum(tl.maximum(token, 0), last))
        there = tl.load(document_ids + batch_start + tl.minimum(tl.maximum(other, 0), last))
        return here == there
    else:
        return token == token


@triton.jit
def _mix(trap, at, inside):
    """λ: sigmoid of trap, or 1 where there is no trapezoid."""
    if trap is None:
        return tl.where(inside, 1.0, 1.0)
    else:
        return tl.sigmoid(tl.load(trap + at, mask=inside, other=0.0).to(tl.float32))


@triton.jit(do_not_specialize=["seqlen", "chunks"])
def token_scales_kernel(
    dt, A, trap, angles, document_ids, log_decay, key_log, diagonal, chunk_decay, phase, seqlen, chunks,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, CHUNK: tl.constexpr, TOKEN_BLOCK: tl.constexpr, PAIR_BLOCK: tl.constexpr,
    FIXED_ANGLES: tl.constexpr, EXACT: tl.constexpr, HEAD_BLOCK: tl.constexpr, HEAD_SPLIT: tl.constexpr,
):  # fmt: skip
    DOCUMENTS: tl.constexpr = document_ids is not None
    blocks: tl.constexpr = (HEADS + HEAD_BLOCK - 1) // HEAD_BLOCK
    chunk = tl.program_id(0) // (blocks * HEAD_SPLIT)
    block = tl.program_id(0) // HEAD_SPLIT % blocks
    split = tl.program_id(0) % HEAD_SPLIT
    batch = tl.program_id(1).to(tl.int64)
    start = batch * seqlen
    head = block * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
    token = chunk * CHUNK + tl.arange(0, TOKEN_BLOCK)
    inside = tl.arange(0, TOKEN_BLOCK) < CHUNK  # a chunk is padded to the 16 rows a product needs
    counts = inside & (token < seqlen)
    valid = counts[:, None] & (head < HEADS)[None, :]
    at = (start + token)[:, None] * HEADS + head[None, :]
    summing = _inside_document(document_ids, start, token, seqlen, DOCUMENTS)

    length = chunks * CHUNK

    if split == 0:
        step = tl.load(dt + at, mask=valid, other=0.0).to(tl.float32)
        rate = tl.load(A + at, mask=valid, other=0.0).to(tl.float32)
        # [C, C] @ [C, heads] -> [C, heads]
        decay = _sum(summing, step * rate * 1.4426950408889634, True)
        gamma = _mix(trap, at, valid) * step
        scale = gamma
        if trap is not None:
            ahead = valid & (token + 1 < seqlen)[:, None]
            ahead &= _same_document(document_ids, start, token, token + 1, seqlen, DOCUMENTS)[:, None]
            next_step = tl.load(dt + at + HEADS, mask=ahead, other=0.0).to(tl.float32)
            scale += tl.where(ahead, (1 - _mix(trap, at + HEADS, ahead)) * next_step, 0.0)

        out = (batch * HEADS + head)[None, :] * length + token[:, None]
        known = inside[:, None] & (head < HEADS)[None, :]
        tl.store(log_decay + out, decay, mask=known)
        tl.store(key_log + out, decay - tl.log2(scale), mask=known)
        tl.store(diagonal + out, gamma, mask=known)
        is_last = (tl.arange(0, TOKEN_BLOCK) == CHUNK - 1)[:, None]
        total = tl.exp2(tl.sum(tl.where(is_last, decay, 0.0), axis=0))
        if DOCUMENTS:  # the state dies in a chunk that ends in another document than the one running before it
            before = tl.load(document_ids + start + tl.maximum(chunk * CHUNK - 1, 0))
            last = tl.load(document_ids + start + tl.minimum(chunk * CHUNK + CHUNK, seqlen) - 1)
            total = tl.where(before == last, total, 0.0)
        tl.store(chunk_decay + (batch * HEADS + head) * chunks + chunk, total, mask=head < HEADS)

    if PAIRS > 0:
        pair = tl.arange(0, PAIR_BLOCK)
        known = counts[:, None] & (pair < PAIRS)[None, :]
        if FIXED_ANGLES:
            logits = tl.load(angles + pair, mask=pair < PAIRS, other=0.0).to(tl.float32)
            turn = tl.where(known, logits[None, :] * 0.15915494309189535, 0.0)
        else:
            logits = tl.load(angles + (start + token)[:, None] * PAIRS + pair[None, :], mask=known, other=0.0)
            turn = tl.sigmoid(2 * logits.to(tl.float32)) - 0.5  # tanh(logits) / 2
        for i in range(HEAD_BLOCK // HEAD_SPLIT):
            this = block * HEAD_BLOCK + split * (HEAD_BLOCK // HEAD_SPLIT) + i
            if this < HEADS:
                increment = turn
                if not FIXED_ANGLES:
                    step_of_head = tl.load(dt + (start + token) * HEADS + this, mask=counts, other=0.0)
                    increment = turn * step_of_head.to(tl.float32)[:, None]
                # [C, C] @ [C, S] -> [C, S]
                turns = _sum(summing, increment, EXACT)
                turns -= tl.floor(turns + 0.5)
                to = phase + ((batch * HEADS + this) * length + token)[:, None] * PAIRS + pair[None, :]
                if phase.dtype.element_ty == tl.int16:
                    # A turn of exactly one half wraps to −2¹⁵, which is the same angle.
                    turns = tl.floor(turns * 65536 + 0.5)
                    turns = tl.where(turns > 32767, turns - 65536, turns)
                tl.store(to, turns.to(phase.dtype.element_ty), mask=(pair < PAIRS)[None, :] & inside[:, None])


@triton.jit(do_not_specialize=["seqlen", "chunks", "head_start"])
def token_scales_backward_kernel(
    dt, A, trap, angles, document_ids, key_inner, query_inner, d_diagonal, d_phase, state_inner, d_chunk_turn,
    d_dt, d_A, d_trap, d_angles, seqlen, chunks, head_start,
    HEADS: tl.constexpr, HEADS_HERE: tl.constexpr, PAIRS: tl.constexpr, CHUNK: tl.constexpr,
    TOKEN_BLOCK: tl.constexpr, PAIR_BLOCK: tl.constexpr, FIXED_ANGLES: tl.constexpr, EXACT: tl.constexpr,
    HEAD_BLOCK: tl.constexpr, INITIAL_STATE: tl.constexpr, INNER_PARTS: tl.constexpr, TURN_PARTS: tl.constexpr,
    HEADS_AHEAD: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Gradients of dt, A, trap and angles from those of the scales.

    query_inner, key_inner: ⟨q, dq⟩ and ⟨k, dk⟩ of each token, ranks summed; their difference is the gradient by log
    decay, because a decay scales every product of an earlier key with a later query. The key's off-diagonal part is
    f · df. state_inner: ⟨S, dS⟩ at each chunk's end, in INNER_PARTS (a power of two) partial sums: it counts for every
    decay of the chunk's last document. d_phase, d_chunk_turn: the same for the angle, in TURN_PARTS.
    An angle's gradient is d_phase summed from the token to the chunk's end, plus d_chunk_turn there; or d_chunk_turn at
    the chunk's start less d_phase summed up to the token. They differ by the rounding of states, so where one document
    fills the chunk the mean of both is taken: 13 % less error in bfloat16.
    Of one pass's heads; d_phase: (batch, HEADS_HERE, padded length, PAIRS). d_angles: one (batch, seqlen, PAIRS) a pass
    and head block.
    """
    DOCUMENTS: tl.constexpr = document_ids is not None
    blocks: tl.constexpr = (HEADS_HERE + HEAD_BLOCK - 1) // HEAD_BLOCK
    chunk = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    batch = tl.program_id(1).to(tl.int64)
    start = batch * seqlen
    length = chunks * CHUNK
    head = head_start + block * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
    end = head_start + HEADS_HERE
    token = chunk * CHUNK + tl.arange(0, TOKEN_BLOCK)
    inside = tl.arange(0, TOKEN_BLOCK) < CHUNK  # a chunk is padded to the 16 rows a product needs
    counts = inside & (token < seqlen)
    valid = counts[:, None] & (head < end)[None, :]
    at = (start + token)[:, None] * HEADS + head[None, :]
    scratch = (batch * HEADS + head)[None, :] * length + token[:, None]
    summing = tl.trans(_inside_document(document_ids, start, token, seqlen, DOCUMENTS))
    in_last = _same_document(document_ids, start, token, chunk * CHUNK + CHUNK - 1, seqlen, DOCUMENTS)
    goes_on = _same_document(document_ids, start, token, token - 1, seqlen, DOCUMENTS)  # not a document's first token
    if not INITIAL_STATE:
        goes_on &= token > 0

    part = ((batch * HEADS + head)[:, None] * chunks + chunk) * INNER_PARTS + tl.arange(0, INNER_PARTS)[None, :]
    at_end = tl.load(state_inner + part, mask=(head < end)[:, None], other=0.0)
    keys = tl.load(key_inner + scratch, mask=valid, other=0.0)
    # [C, C] @ [C, heads] -> [C, heads]
    d_log = _sum(summing, tl.load(query_inner + scratch, mask=valid, other=0.0) - keys, True)
    d_log += tl.where(in_last[:, None], tl.sum(at_end, axis=1)[None, :], 0.0)
    d_log = tl.where(goes_on[:, None], d_log, 0.0)

    step = tl.load(dt + at, mask=valid, other=0.0).to(tl.float32)
    mix = _mix(trap, at, valid)
    by_diagonal = tl.load(d_diagonal + scratch, mask=valid, other=0.0)
    scale = mix * step
    d_scale_before = tl.zeros_like(step)
    by_scale = keys - by_diagonal * scale
    if trap is not None:
        ahead = valid & (token + 1 < seqlen)[:, None]
        ahead &= _same_document(document_ids, start, token, token + 1, seqlen, DOCUMENTS)[:, None]
        next_step = tl.load(dt + at + HEADS, mask=ahead, other=0.0).to(tl.float32)
        scale += tl.where(ahead, (1 - _mix(trap, at + HEADS, ahead)) * next_step, 0.0)
        back = valid & (token > 0)[:, None]
        back &= _same_document(document_ids, start, token, token - 1, seqlen, DOCUMENTS)[:, None]
        step_before = tl.load(dt + at - HEADS, mask=back, other=0.0).to(tl.float32)
        gamma_before = _mix(trap, at - HEADS, back) * step_before
        scale_before = gamma_before + (1 - mix) * step
        keys_before = tl.load(key_inner + scratch - 1, mask=back, other=0.0)
        keys_before -= tl.load(d_diagonal + scratch - 1, mask=back, other=0.0) * gamma_before
        d_scale_before = tl.where(back & (scale_before > 0), keys_before / scale_before, 0.0)
    d_scale = tl.where(scale > 0, by_scale / scale, 0.0) + by_diagonal

    rate = tl.load(A + at, mask=valid, other=0.0).to(tl.float32)
    d_step = rate * d_log + mix * d_scale + (1 - mix) * d_scale_before
    tl.store(d_A + at, (step * d_log).to(d_A.dtype.element_ty), mask=valid)
    if trap is not None:
        d_logit = step * (d_scale - d_scale_before) * mix * (1 - mix)
        tl.store(d_trap + at, d_logit.to(d_trap.dtype.element_ty), mask=valid)

    if PAIRS > 0:
        first = chunk * CHUNK
        from_start = _same_document(document_ids, start, first, first + CHUNK - 1, seqlen, DOCUMENTS)
        if INITIAL_STATE:  # what it contributes is not known there
            from_start &= chunk > 0
        carried = from_start & (chunk > 0) & _same_document(document_ids, start, first, first - 1, seqlen, DOCUMENTS)
        summing -= tl.where(from_start, 0.5, 0.0)
        pair = tl.arange(0, PAIR_BLOCK)
        known = counts[:, None] & (pair < PAIRS)[None, :]
        here = (start + token)[:, None] * PAIRS + pair[None, :]
        turn = tl.zeros((TOKEN_BLOCK, PAIR_BLOCK), tl.float32)
        if not FIXED_ANGLES:  # π · tanh(logits)
            logits = tl.load(angles + here, mask=known, other=0.0).to(tl.float32)
            turn = 3.141592653589793 * (2 * tl.sigmoid(2 * logits) - 1)
        total = tl.zeros((TOKEN_BLOCK, PAIR_BLOCK), tl.float32)
        part = tl.arange(0, 2 * TURN_PARTS)[:, None] - TURN_PARTS  # those of the chunk before, and its own
        piece = part * PAIRS + pair[None, :]
        edges = (pair < PAIRS)[None, :] & ((part >= 0) | carried)
        share = tl.where(from_start, 0.5, 1.0)
        for i in range(0, HEAD_BLOCK, HEADS_AHEAD):
            tiles = ()
            for j in tl.static_range(HEADS_AHEAD):
                this = head_start + block * HEAD_BLOCK + i + j
                of_head = batch * HEADS + this
                of_pass = batch * HEADS_HERE + this - head_start
                by_phase = tl.load(d_phase + (of_pass * length + token)[:, None] * PAIRS + pair[None, :],
                                   mask=known & (this < end), other=0.0)  # fmt: skip
                by_edges = tl.load(d_chunk_turn + (of_head * chunks + chunk) * (TURN_PARTS * PAIRS) + piece,
                                   mask=edges & (this < end), other=0.0)  # fmt: skip
                step_of_head = tl.load(dt + (start + token) * HEADS + this, mask=counts & (this < end), other=0.0)
                tiles = tiles + ((by_phase, by_edges, step_of_head),)  # noqa: RUF005
            for j in tl.static_range(HEADS_AHEAD):
                by_phase, by_edges, step_of_head = tiles[j]
                # [C, C] @ [C, S] -> [C, S]
                d_turn = _sum(summing, hold(by_phase, HARDWARE), EXACT)
                d_turn += tl.where(in_last[:, None], share * tl.sum(by_edges, axis=0)[None, :], 0.0)
                d_turn = tl.where(goes_on[:, None], d_turn, 0.0)
                if FIXED_ANGLES:
                    total += tl.where(known, d_turn, 0.0)
                else:
                    total += d_turn * step_of_head.to(tl.float32)[:, None]
                    from_turn = tl.sum(turn * d_turn, axis=1)
                    d_step += tl.where((tl.arange(0, HEAD_BLOCK) == i + j)[None, :], from_turn[:, None], 0.0)
        if not FIXED_ANGLES:  # d tanh = 1 − tanh²
            total *= 3.141592653589793 - turn * turn * 0.3183098861837907
        out = (
            d_angles
            + (head_start // HEADS_HERE * blocks + block) * (tl.num_programs(1).to(tl.int64) * seqlen * PAIRS)
            + here
        )
        tl.store(out, total, mask=known)
    tl.store(d_dt + at, d_step.to(d_dt.dtype.element_ty), mask=valid)
