"""Sizes of one call of the Triton scan, and what follows from them."""

from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd

import torch
import triton
from torch import Tensor

from mamba3_train.kernels import launch_table, state_passing
from mamba3_train.kernels.inputs import Inputs
from mamba3_train.kernels.launch import (
    Launch,
    choose,
    heads_in_pass,
    hopper,
    interpreted,
    programs_ahead,
    runs_on_hopper,
    shared_memory,
)


@dataclass(frozen=True)
class Sizes:
    """Sizes of one call and what follows from them."""

    batch: int
    seqlen: int
    heads: int
    groups: int
    head_dim: int
    d_state: int
    pairs: int
    rank: int
    dtype: torch.dtype
    device: torch.device
    launch: Launch
    on_hopper: bool

    @classmethod
    def of(cls, inputs: Inputs, launch: Launch | int = 0) -> "Sizes":
        """Sizes of a call with this launch configuration of the portable kernels, or with the table's: in chunks of
        this many tokens (0: as the table says), on the kernels for Hopper where they serve."""
        batch, seqlen, heads, head_dim = inputs.x.shape
        rank, groups, d_state = inputs.B.shape[2:]
        pairs = 0 if inputs.angles is None else inputs.angles.shape[-1]
        dtype, device = inputs.x.dtype, inputs.x.device
        on_hopper = False
        if isinstance(launch, int):
            launch = choose(rank, head_dim, d_state, dtype, launch, shared_memory(device))
            on_hopper = runs_on_hopper(inputs, launch.chunk)
            if on_hopper:
                launch = launch._replace(**launch_table.find("hopper", int(d_state * head_dim))["kernels"])
        return cls(batch, seqlen, heads, groups, head_dim, d_state, pairs, rank, dtype, device, launch, on_hopper)

    def in_forward(self) -> "Sizes":
        """The same with the forward's passes, which need less memory a head."""
        return replace(self, launch=self.launch._replace(heads=self.launch.forward_heads))

    @cached_property
    def chunks(self) -> int:
        return -(-self.seqlen // self.launch.chunk)

    @cached_property
    def padded(self) -> int:
        return self.chunks * self.launch.chunk

    @cached_property
    def heads_here(self) -> int:
        return heads_in_pass(self.heads, self.groups, self.launch.heads)

    @cached_property
    def column_pairs(self) -> int:
        """Largest power of two up to 16 that divides the rotated and all pairs of columns."""
        return gcd(gcd(self.pairs, self.d_state // 2), 16)

    @cached_property
    def pair_block(self) -> int:
        return max(16, triton.next_power_of_2(self.pairs))

    @cached_property
    def hardware(self) -> bool:
        return not interpreted() and torch.version.hip is None

    @cached_property
    def chunk_constants(self) -> dict:
        """Compile-time arguments that the chunk kernels share."""
        return {
            "HEADS": self.heads, "HEADS_HERE": self.heads_here, "GROUPS": self.groups, "HEAD_DIM": self.head_dim,
            "D_STATE": self.d_state, "PAIRS": self.pairs, "RANK": self.rank, "CHUNK": self.launch.chunk,
            "PAIR_BLOCK": self.pair_block,
            "REST_BLOCK": max(16, triton.next_power_of_2(self.d_state - 2 * self.pairs)),
            "HARDWARE": self.hardware, "AHEAD": programs_ahead(self.device) if self.hardware else 0,
            "PRECISION": "tf32x3" if self.dtype == torch.float32 else "tf32",
        }  # fmt: skip

    @cached_property
    def passing_constants(self) -> dict:
        return {
            "HEADS": self.heads, "HEAD_DIM": self.head_dim, "D_STATE": self.d_state,
            "PAIRS": self.pairs, "CHUNK": self.launch.chunk, "ROWS": state_passing.ROWS,
            "COLUMN_PAIRS": self.column_pairs, "HARDWARE": self.hardware,
        }  # fmt: skip

    @cached_property
    def inner_parts(self) -> int:
        """Partial sums of S · dS a chunk: one a program of the state passing, padded to a power of two."""
        return triton.next_power_of_2(self.passing_programs)

    @cached_property
    def passing_programs(self) -> int:
        return self.head_dim // state_passing.ROWS * (self.d_state // 2 // self.column_pairs)

    def constants(self, inputs: Inputs) -> dict:
        """Compile-time arguments of this call's chunk kernels."""
        constants = self.chunk_constants | {"TOKEN_STRIDE": inputs.token_stride}
        return {name: constants[name] for name in hopper().CONSTANTS} if self.on_hopper else constants

    def keeps_y(self, inputs: Inputs) -> bool:
        """Whether the forward keeps y: at rank 1 behind a gate, where the portable kernels recompute it at some cost.

        The norm's gradient would suffer from y's rounding.
        """
        gated = inputs.z is not None or inputs.mimo_o is not None
        return self.rank == 1 and gated and inputs.norm_weight is None and not self.on_hopper

    def passes(self):
        return range(0, self.heads, self.heads_here)

    def chunk_grid(self) -> tuple[int, int]:
        return self.chunks * self.heads_here, self.batch

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def state_slots(self, slots: int) -> Tensor:
        """One state for each slot and head of a pass."""
        return self.empty(self.batch, slots, self.heads_here, self.head_dim, self.d_state, dtype=self.dtype)
