"""Sizes of one call of the Triton scan, and what follows from them: each launch's grid and compile-time arguments."""

from functools import cached_property, lru_cache
from math import gcd
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from mamba3_train.kernels import head_sum, launch_table, span_passing, state_passing, token_scales
from mamba3_train.kernels.inputs import Inputs
from mamba3_train.kernels.launch import (
    Launch,
    Launcher,
    choose,
    hopper,
    interpreted,
    programs_ahead,
    runs_on_hopper,
    shared_memory,
)

FEWEST_WALKS = 128
"""Where fewer could walk along whole sequences, more walk along spans."""


class Given(NamedTuple):
    """Sizes of one call and all else that decides how its kernels are launched.

    types: the inputs' dtypes, None where there is none. token_stride: of x and z; ahead: programs ahead to fetch for;
    keep: see `mamba3_scan`.
    """

    batch: int
    seqlen: int
    heads: int
    groups: int
    head_dim: int
    d_state: int
    pairs: int
    rank: int
    fixed_angles: bool
    types: Inputs
    device: torch.device
    launch: Launch
    on_hopper: bool
    interpreted: bool
    token_stride: int | None = None
    ahead: int | None = None
    keep: str = "scales"


class Sizes(Given):
    """Sizes of one call and what follows from them, computed when first asked for."""

    @classmethod
    def of(cls, inputs: Inputs, launch: Launch | int = 0) -> "Sizes":
        """Sizes of a call with this launch configuration of the portable kernels, or with the table's: in chunks of
        this many tokens (0: as the table says), on the kernels for Hopper where they serve. They may be symbols."""
        x, angles = inputs.x, inputs.angles
        rank, groups, d_state = inputs.B.shape[2:]
        batch, seqlen, heads, head_dim = x.shape
        pairs, fixed_angles = (0, False) if angles is None else (angles.shape[-1], angles.dim() == 1)
        types, device = Inputs(*(t if t is None else t.dtype for t in inputs)), x.device
        on_hopper = False
        if isinstance(launch, int):
            launch = choose(rank, head_dim, d_state, x.dtype, launch, shared_memory(device))
            on_hopper = runs_on_hopper(inputs, launch.chunk)
            if on_hopper:
                launch = launch._replace(**launch_table.find("hopper", int(d_state * head_dim))["kernels"])
        return cls(
            batch, seqlen, heads, groups, head_dim, d_state, pairs, rank, fixed_angles, types, device, launch,
            on_hopper, interpreted(),
        )  # fmt: skip

    @classmethod
    def known(cls, inputs: Inputs, launch: Launch | int = 0) -> "Sizes":
        """Sizes of a call with these inputs, which are `readable`; one object for equal calls."""
        sizes = cls.of(inputs, launch)
        return _known(sizes, inputs.token_stride, programs_ahead(sizes.device) if sizes.hardware else 0)

    @cached_property
    def in_forward(self) -> "Sizes":
        """The same with the forward's passes, which need less memory a head; of more heads where walks fill a GPU."""
        return self.in_training if self.walks_whole else self._with_heads(self.launch.forward_heads)

    @cached_property
    def in_training(self) -> "Sizes":
        """The same with passes that fill a GPU with walks in any case: the backward that follows needs more memory."""
        walking = launch_table.WALKS // self.batch if self.on_hopper else 0
        return self._with_heads(max(self.launch.forward_heads, walking))

    def keeping(self, keep: str) -> "Sizes":
        """The same for another choice of what is kept; one object for the same choice."""
        if keep not in self._keeping:
            self._keeping[keep] = self._replace(keep=keep)
        return self._keeping[keep]

    @cached_property
    def _keeping(self) -> dict[str, "Sizes"]:
        return {self.keep: self}

    def _with_heads(self, heads: int) -> "Sizes":
        return self._replace(launch=self.launch._replace(heads=heads))

    @cached_property
    def dtype(self) -> torch.dtype:
        return self.types.x

    @cached_property
    def chunks(self) -> int:
        return -(-self.seqlen // self.launch.chunk)

    @cached_property
    def padded(self) -> int:
        return self.chunks * self.launch.chunk

    @cached_property
    def heads_here(self) -> int:
        return launch_table.heads_in_pass(self.heads, self.groups, self.launch.heads)

    @cached_property
    def passes(self) -> range:
        """The first head of each pass."""
        return range(0, self.heads, self.heads_here)

    @cached_property
    def column_pairs(self) -> int:
        """Largest power of two up to 16 that divides the rotated and all pairs of columns."""
        return gcd(gcd(self.pairs, self.d_state // 2), 16)

    @cached_property
    def pair_block(self) -> int:
        return max(16, triton.next_power_of_2(self.pairs))

    @cached_property
    def hardware(self) -> bool:
        return not self.interpreted and torch.version.hip is None

    @cached_property
    def passing_programs(self) -> int:
        return self.head_dim // state_passing.ROWS * (self.d_state // 2 // self.column_pairs)

    @cached_property
    def inner_parts(self) -> int:
        """Partial sums of S · dS a chunk: one a program of the state passing, padded to a power of two; or a warp."""
        return self.walk_warps if self.on_hopper else triton.next_power_of_2(self.passing_programs)

    @cached_property
    def turn_parts(self) -> int:
        """Partial sums of the gradient of a chunk's whole turn: one for ROWS rows of the state, or for a warp's."""
        return self.walk_warps if self.on_hopper else self.head_dim // state_passing.ROWS

    @cached_property
    def head_blocks(self) -> int:
        """Blocks of a pass's heads that one program of the token scales' backward takes together."""
        return triton.cdiv(self.heads_here, token_scales.HEAD_BLOCK)

    @cached_property
    def token_blocks(self) -> int:
        """Blocks of tokens that one program of the head sums takes together."""
        return triton.cdiv(self.seqlen, head_sum.tile(self.rank)["TOKENS"])

    @cached_property
    def on_chunks(self) -> dict[str, Launcher]:
        """Launches of each chunk kernel."""
        constants = {
            "HEADS": self.heads, "HEADS_HERE": self.heads_here, "GROUPS": self.groups, "HEAD_DIM": self.head_dim,
            "D_STATE": self.d_state, "PAIRS": self.pairs, "RANK": self.rank, "CHUNK": self.launch.chunk,
            "PAIR_BLOCK": self.pair_block,
            "REST_BLOCK": max(16, triton.next_power_of_2(self.d_state - 2 * self.pairs)),
            "HARDWARE": self.hardware, "AHEAD": self.ahead, "TOKEN_STRIDE": self.token_stride,
            "PRECISION": "tf32x3" if self.dtype == torch.float32 else "tf32",
        }  # fmt: skip
        kernels = dict.fromkeys(("states", "outputs", "outputs_backward", "queries", "keys"), constants)
        if self.on_hopper:
            constants = {name: constants[name] for name in hopper().CONSTANTS}
            states = constants | {"STATE_HEADS": self.state_heads}
            kernels = {"states": states, "outputs": states, "queries": states, "keys": constants}
        return {
            kernel: Launcher(self.chunk_grid, own | self.launch.options(kernel, self.hardware))
            for kernel, own in kernels.items()
        }

    @property
    def keeps_states(self) -> bool:
        """Whether the forward leaves the states of all heads and chunks to the backward, which is only on Hopper."""
        return self.on_hopper and self.keep in ("states", "outputs")

    @property
    def state_heads(self) -> int:
        """Heads whose states lie together on Hopper: of all of them or of a pass."""
        return self.heads if self.keeps_states else self.heads_here

    @property
    def phase_grads(self) -> tuple[int, ...]:
        """Shape of the gradients by phase: of one pass, or of two where one's are read while the next one's arise."""
        return 1 + self.keeps_states, self.batch, self.heads_here, self.padded, self.pairs

    def phase_slot(self, head: int) -> int:
        """Which of them are those of the pass that begins with this head."""
        return head // self.heads_here % self.phase_grads[0]

    @property
    def walk_warps(self) -> int:
        """Of a program that walks on Hopper."""
        return self.launch.states[0]

    @property
    def span(self) -> int:
        return launch_table.chunks_of_span(self.rank)

    @cached_property
    def spans(self) -> int:
        """Of a sequence, on Hopper: see `state_walks`."""
        return -(-self.chunks // self.span)

    @cached_property
    def kept_states(self) -> tuple[int, ...]:
        """Shape of the spans' states."""
        return self.batch, self.heads, self.spans, self.head_dim, self.d_state

    @cached_property
    def all_states(self) -> tuple[int, ...]:
        """Shape of the states of all heads and chunks."""
        return self.batch, self.chunks + 1, self.heads, self.head_dim, self.d_state

    @cached_property
    def walks_whole(self) -> bool:
        """Whether one program walks a head's whole sequence in the forward: where there are enough to fill a GPU."""
        return self.batch * self.heads >= FEWEST_WALKS

    @cached_property
    def walks_back_whole(self) -> bool:
        """The same for one pass of the backward."""
        return self.batch * self.heads_here >= FEWEST_WALKS

    @cached_property
    def spans_of_walk(self) -> int:
        """That one program walks in the forward: few enough for all programs together to fill a GPU."""
        walks = 1 if self.walks_whole else min(self.spans, max(1, launch_table.WALKS // (self.batch * self.heads_here)))
        return triton.cdiv(self.spans, walks)

    @cached_property
    def walk(self) -> Launcher:
        """Of the forward."""
        walks = triton.cdiv(self.spans, self.spans_of_walk)
        return Launcher((self.heads_here, self.batch, walks), self._walk_options)

    @cached_property
    def walk_spans(self) -> Launcher:
        return Launcher((self.heads_here, self.batch, self.spans), self._walk_options)

    @cached_property
    def walk_back(self) -> Launcher:
        options = {name: v for name, v in self._walk_options.items() if name not in ("TOKEN_STRIDE", "SPAN")}
        walks = 1 if self.walks_back_whole else self.spans
        options |= {"WHOLE": self.walks_back_whole, "INNER_PARTS": self.inner_parts}
        return Launcher((self.heads_here, self.batch, walks), options)

    def span_sums(self, spans: int, back: bool) -> Launcher:
        """Of what so many spans add to the state, or to its gradient: but the one behind which nobody asks for it."""
        if (spans, back) not in self._span_sums:
            grid = self.heads_here, self.batch, spans - 1
            options = {name: value for name, value in self._walk_options.items() if name != "STATE_HEADS"}
            self._span_sums[spans, back] = Launcher(grid, options | {"BACK": back})
        return self._span_sums[spans, back]

    @cached_property
    def _span_sums(self) -> dict[tuple[int, bool], Launcher]:
        return {}

    @cached_property
    def _walk_options(self) -> dict:
        options = {name: value for name, value in self.on_chunks["states"].options.items() if name != "AHEAD"}
        return options | {"SPAN": self.span}

    @cached_property
    def span_passing(self) -> tuple[Launcher, Launcher]:
        """Of the states, and of their gradients."""
        options = {name: v for name, v in self.passing.options.items() if name not in ("CHUNK", "UNROLL")}
        options |= {"HEADS_HERE": self.heads_here, "AHEAD": span_passing.AHEAD}
        return tuple(Launcher(self.passing.grid, options | {"BACKWARD": backward}) for backward in (False, True))

    @cached_property
    def of_all_heads(self) -> "Sizes":
        """The same in one pass."""
        return self._with_heads(self.heads)

    @cached_property
    def chunk_grid(self) -> tuple[int, int]:
        return self.chunks * self.heads_here, self.batch

    @cached_property
    def gate_backward(self) -> Launcher:
        options = {
            "HEADS": self.heads, "HEADS_HERE": self.heads_here, "HEAD_DIM": self.head_dim, "CHUNK": self.launch.chunk,
            "HARDWARE": self.hardware, "TOKEN_STRIDE": self.token_stride, "num_warps": 4,
        }  # fmt: skip
        return Launcher(self.chunk_grid, options)

    @cached_property
    def passing(self) -> Launcher:
        options = {
            "HEADS": self.heads, "HEAD_DIM": self.head_dim, "D_STATE": self.d_state, "PAIRS": self.pairs,
            "CHUNK": self.launch.chunk, "ROWS": state_passing.ROWS, "COLUMN_PAIRS": self.column_pairs,
            "HARDWARE": self.hardware, "UNROLL": 2 if self.interpreted else state_passing.UNROLL, "num_warps": 1,
        }  # fmt: skip
        return Launcher((self.passing_programs, self.heads_here, self.batch), options)

    @cached_property
    def passing_backward(self) -> Launcher:
        unroll = 2 if self.interpreted else state_passing.UNROLL_BACKWARD
        return Launcher(self.passing.grid, self.passing.options | {"UNROLL": unroll, "INNER_PARTS": self.inner_parts})

    @cached_property
    def scales(self) -> Launcher:
        """All heads at once."""
        blocks = self.chunks * triton.cdiv(self.heads, token_scales.HEAD_BLOCK)
        options = self._scales_options | {"HEAD_SPLIT": token_scales.HEAD_SPLIT}
        return Launcher((blocks * token_scales.HEAD_SPLIT, self.batch), options)

    @cached_property
    def scales_backward(self) -> Launcher:
        options = self._scales_options | {
            "HEADS_HERE": self.heads_here, "INITIAL_STATE": self.types.initial is not None,
            "INNER_PARTS": self.inner_parts, "TURN_PARTS": self.turn_parts,
            "HEADS_AHEAD": token_scales.heads_ahead(self.pair_block), "HARDWARE": self.hardware,
        }  # fmt: skip
        return Launcher((self.chunks * self.head_blocks, self.batch), options)

    @cached_property
    def _scales_options(self) -> dict:
        return {
            "HEADS": self.heads, "PAIRS": self.pairs, "CHUNK": self.launch.chunk,
            "TOKEN_BLOCK": max(16, self.launch.chunk), "PAIR_BLOCK": self.pair_block,
            "FIXED_ANGLES": self.fixed_angles, "EXACT": self.dtype == torch.float32,
            "HEAD_BLOCK": token_scales.HEAD_BLOCK, "num_warps": 4,
        }  # fmt: skip

    @cached_property
    def head_sums(self) -> Launcher:
        tile = head_sum.tile(self.rank)
        blocks = self.token_blocks * triton.cdiv(self.d_state, tile["COLUMNS"])
        groups_here = max(1, self.heads_here * self.groups // self.heads)
        options = {"HEADS": self.heads, "GROUPS": self.groups, "D_STATE": self.d_state, "RANK": self.rank} | tile
        return Launcher((blocks, self.rank * groups_here, self.batch), options)

    @property
    def keeps_y(self) -> bool:
        """Whether the forward keeps y behind a gate: by choice on Hopper, at rank 1 by the portable kernels.

        Those recompute it at some cost. The norm's gradient would suffer from y's rounding.
        """
        gated = self.types.z is not None or self.types.mimo_o is not None
        wanted = self.keep == "outputs" if self.on_hopper else self.rank == 1 and self.keep != "inputs"
        return wanted and gated and self.types.norm_weight is None

    @cached_property
    def kept_y(self) -> tuple[int, ...]:
        """Shape of y where it is kept: by heads and rows on Hopper, as it is stored there."""
        if self.on_hopper:
            return self.batch, self.heads, self.padded * self.rank, self.head_dim
        return self.batch, self.seqlen, self.heads, self.head_dim

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def state_slots(self, slots: int) -> Tensor:
        """One state for each slot and head of a pass."""
        return self.empty(self.batch, slots, self.heads_here, self.head_dim, self.d_state, dtype=self.dtype)


@lru_cache(maxsize=256)
def _known(sizes: Sizes, token_stride: int, ahead: int) -> Sizes:
    return sizes._replace(token_stride=token_stride, ahead=ahead)
