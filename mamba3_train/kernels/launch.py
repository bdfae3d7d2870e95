"""How the kernels are launched: tile sizes, warps and heads a pass for each regime, and what is refused.

One configuration a regime, no tuning at run time: every rank and every run computes the same bits. They are in
`launch_table`.
"""

import re
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from mamba3_train.kernels import launch_table


class Launch(NamedTuple):
    """One regime's configuration.

    chunk: tokens of a chunk, whose chunk · rank rows are one tile; heads, forward_heads: heads of one pass of the
    backward and of the forward, which bound the workspace. For each chunk kernel its warps and, where a cap pays, its
    registers a thread.
    """

    chunk: int
    heads: int = 16
    forward_heads: int = 64
    states: tuple[int, int | None] = (4, None)
    outputs: tuple[int, int | None] = (4, None)
    outputs_backward: tuple[int, int | None] = (4, None)
    queries: tuple[int, int | None] = (4, None)
    keys: tuple[int, int | None] = (4, None)

    def options(self, kernel: str, hardware: bool) -> dict[str, int]:
        """Compiler options of one chunk kernel, for an NVIDIA GPU (hardware) or something else.

        No software pipelining, which has been wrong on Blackwell.
        """
        warps, registers = getattr(self, kernel)
        options = {"num_warps": warps, "num_stages": 1}
        return options | {"maxnreg": registers} if hardware and registers is not None else options


RANKS, HEAD_DIMS = (1, 2, 4, 8), (16, 32, 64, 128)


@cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def check_sizes(rank: int, head_dim: int, d_state: int, dtype: torch.dtype) -> None:
    """Raise ValueError for sizes or a dtype that no kernel serves."""
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


def choose(rank: int, head_dim: int, d_state: int, dtype: torch.dtype, chunk: int = 0, shared_kib: int = 227) -> Launch:
    """The configuration for these sizes; chunk 0 is the table's; shared_kib: shared memory a block may have, in KiB.

    Raises:
        ValueError: sizes or a dtype that no kernel serves.
    """
    check_sizes(rank, head_dim, d_state, dtype)
    # int: under torch.compile a size may be a symbol, which no cache takes.
    regime = launch_table.find("single" if dtype == torch.float32 else "half", int(d_state * head_dim))
    rows = regime["rows"]
    if shared_kib < 128:
        rows = regime.get("small_rows", rows)
    largest, least = rows // rank, max(1, 16 // rank)
    if chunk and (chunk & (chunk - 1) or not least <= chunk <= largest):
        raise ValueError(
            f"backend 'triton' takes a chunk_size of a power of two from {least} to {largest}, got {chunk}"
        )
    return Launch(
        chunk=chunk or largest,
        heads=launch_table.heads_of_pass(regime, rank),
        forward_heads=max(1, 2 * regime["heads"] // rank),
        **regime["kernels"],
    )


def runs_on_hopper(inputs, chunk: int) -> bool:
    """Whether the kernels of `kernels.hopper` serve these inputs on their device, in chunks of `chunk` tokens."""
    x, rank, d_state = inputs.x, inputs.B.shape[2], inputs.B.shape[-1]
    pairs = 0 if inputs.angles is None else inputs.angles.shape[-1]
    rest = d_state - 2 * pairs
    return (
        not interpreted()
        and _is_hopper(x.device)
        and x.element_size() == 2
        and chunk * rank == x.shape[-1] == 64
        and pairs in (16, 32, 64)
        and rest in (0, 16, 32, 64)
        and inputs.z is not None
        and (rank == 1) == (inputs.mimo_x is None) == (inputs.mimo_o is None)
        and hopper() is not None
    )


@cache
def _is_hopper(device: torch.device) -> bool:
    if device.type == "meta":  # only compiled
        return True
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) == (9, 0)


@cache
def hopper():
    """The package of kernels for Hopper; None where Triton's Gluon is not as they were written for."""
    if not triton.__version__.startswith(("3.6.", "3.7.")):
        return None
    from mamba3_train.kernels import hopper as package

    return package


@cache
def shared_memory(device: torch.device) -> int:
    """KiB of shared memory that a block may have; as on Hopper where nothing runs on a GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 227
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin // 1024


@cache
def programs_ahead(device: torch.device) -> int:
    """How many programs ahead to fetch into the L2 cache: two for each multiprocessor, from Hopper on."""
    if device.type == "meta":  # only compiled
        return 264
    if torch.cuda.get_device_capability(device) < (9, 0):
        return 0
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


_compiled: dict[tuple, tuple] = {}
_checked: set[str] = set()


def run(kernel, grid: tuple[int, ...], *args, **options) -> tuple | None:
    """Launch a kernel, and the first time look at its machine code for Hopper.

    A kernel once compiled for these types and options is launched past Triton's own look-up, which takes longer on the
    host than a small kernel on the device.

    Returns:
        The compiled kernel and its arguments behind args; None where there is none for all tensors of these types.

    Raises:
        RuntimeError: the compiler built it wrong, or it needs more shared memory than this GPU's blocks have.
    """
    if interpreted():
        kernel[grid](*args, **options)
        return None
    values, types, addresses = [], [torch.cuda.current_device()], 0
    for value in args:
        if isinstance(value, Tensor):
            types.append(value.dtype)
            value = value.data_ptr()
            addresses |= value
        else:
            types.append(type(value))
        values.append(value)
    # Triton compiles for addresses divisible by 16; tensors at other addresses are its business.
    key = (kernel.fn.__name__, *types, *options.values()) if addresses % 16 == 0 else None
    known = _compiled.get(key)
    if known is None:
        try:
            compiled = kernel[grid](*args, **options)
        except OutOfResources as short:
            raise RuntimeError(
                f"{kernel.fn.__name__} needs {short.required:,} of {short.name} for these sizes, this GPU has "
                f"{short.limit:,}: use a smaller chunk_size, or kernels=reference"
            ) from short
        _refuse_wrong_code(kernel, compiled)
        if key is not None:
            _compiled[key] = compiled, [options[name] for name in kernel.arg_names[len(args) :]]
        return _compiled.get(key)
    compiled, constants = known
    compiled[(*grid, 1, 1)[:3]](*values, *constants)
    return known


class Launcher:
    """Launches on one grid with the same options again and again; what `run` found is remembered.

    The tensors have the same dtypes and device each time and lie at addresses divisible by 16; some may be None.
    """

    def __init__(self, grid: tuple[int, ...], options: dict):
        self.grid, self.options, self.known = (*grid, 1, 1)[:3], options, {}

    def __call__(self, kernel, *args) -> None:
        key = (kernel.fn, *map(type, args))
        known = self.known.get(key)
        if known is not None:
            start, constants = known
            start(*[a.data_ptr() if isinstance(a, Tensor) else a for a in args], *constants)
        elif (found := run(kernel, self.grid, *args, **self.options)) is not None:
            compiled, constants = found
            self.known[key] = compiled[self.grid], constants


def _refuse_wrong_code(kernel, compiled) -> None:
    if compiled.hash in _checked:
        return
    hopper_products = compiled.metadata.target.arch == 90 and "wgmma" in compiled.asm["ptx"]
    faults = wrong_descriptors(compiled.asm["sass"]) if hopper_products else []
    if faults:
        raise RuntimeError(
            f"Triton {triton.__version__} builds {kernel.fn.__name__} wrong for these sizes ({faults[0]}): "
            "use kernels=reference, another chunk_size, or another Triton"
        )
    _checked.add(compiled.hash)


def wrong_descriptors(sass: str) -> list[str]:
    """Instructions that build a matrix descriptor's upper half from something else than zero.

    The assembler in Triton 3.6 sometimes computes base + offset of a 64-bit descriptor with the base's lower half in
    both places when one shared-memory address serves two products far apart; the product then reads garbage or an
    illegal address. The constants of the upper half (swizzle and stride) give the instruction away.
    """
    faults, written = [], {}
    for line in sass.splitlines():
        found = re.search(r"\b(U[A-Z0-9.]+) (UR\d+), ([^;]*);", line)
        if not found:
            continue
        name, target, operands = found[1], found[2], [operand.strip() for operand in found[3].split(",")]
        # After an optional carry-out predicate: UIADD3.X target, source, constant, …
        source, constant = (*[o for o in operands if not o.startswith("UP")], "", "")[:2]
        is_upper = name == "UIADD3.X" and re.fullmatch(r"-?0x[4-8][0-9a-f]{7}", constant)
        if is_upper and source.startswith("UR") and source != "URZ" and written.get(source) != ("UMOV", "URZ"):
            faults.append(found[0])
        written[target] = (name, operands[0])
    return faults
