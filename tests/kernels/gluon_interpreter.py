"""Runs the kernels for Hopper without a GPU, program by program: Gluon has no interpreter of its own.

A kernel is run as the Python that it is, on torch tensors. Layouts are ignored: what threads hold which number is the
compiler's business, which checks it (`tools/compile_kernels.py`). Copies and products happen when they are waited for,
not when they are started, and a program that relies on more is told so: AssertionError where it

- reads or writes outside of a tensor, or shared memory that nothing was written to or is being copied to;
- starts a product of shared memory that was written since the last fence;
- uses a product before waiting for it, or a tile that went through such a wait;
- writes over what a product may still be reading, or lets go of it, so that other memory may be put in its place.

Barriers between warps are the compiler's, too, and are not seen here.
"""

import importlib
import itertools
import math
import operator
import sys
import types
from unittest import mock

import torch
import triton.language as tl

DTYPES = {
    torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.int64: tl.int64,
    torch.int32: tl.int32, torch.int16: tl.int16, torch.bool: tl.int1,
}  # fmt: skip
TORCH_DTYPES = {ours: theirs for theirs, ours in DTYPES.items()}


class Tensor:
    """What a program holds in registers."""

    def __init__(self, data: torch.Tensor):
        self.data = data

    dtype = property(lambda self: DTYPES[self.data.dtype])
    shape = property(lambda self: list(self.data.shape))
    type = types.SimpleNamespace(layout=None)

    def __getitem__(self, index):
        return Tensor(self.data[index])

    def __index__(self):
        return int(self.data)

    def __bool__(self):
        return bool(self.data)

    def __neg__(self):
        return Tensor(-self.data)

    def to(self, dtype):
        return Tensor(self.data.to(TORCH_DTYPES[dtype]))


def binary(function):
    """An operation of two tensors or of one and a number, in the dtype that Triton gives it."""

    def apply(left, right):
        operands = [operand.data if isinstance(operand, Tensor) else operand for operand in (left, right)]
        if all(torch.is_tensor(operand) for operand in operands):  # a scalar counts like any other tensor
            dtype = torch.promote_types(operands[0].dtype, operands[1].dtype)
            operands = [operand.to(dtype) for operand in operands]
        return Tensor(function(*operands)) if any(map(torch.is_tensor, operands)) else function(*operands)

    return apply


for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or", "lt", "gt", "le", "ge", "eq"):
    function = binary(getattr(operator, f"__{name}__"))
    setattr(Tensor, f"__{name}__", lambda self, other, f=function: NotImplemented if pointer(other) else f(self, other))
    setattr(Tensor, f"__r{name}__", lambda self, other, f=function: f(other, self))


class Pointer:
    """Places in the memory of a tensor, counted in numbers."""

    def __init__(self, memory: torch.Tensor, at: torch.Tensor):
        self.memory, self.at = memory, at
        self.dtype = types.SimpleNamespace(element_ty=DTYPES[memory.dtype])

    def __add__(self, places):
        return Pointer(self.memory, self.at + (places.data if isinstance(places, Tensor) else places))

    __radd__ = __add__

    def __sub__(self, places):
        return self + -places

    def to(self, dtype):
        assert dtype == tl.int64, f"a pointer as {dtype}"
        return self

    def places(self, mask):
        """Broadcast places and mask, both flat, and their shape; what the mask leaves is inside the memory."""
        at, mask = torch.broadcast_tensors(self.at, torch.tensor(True) if mask is None else mask.data)
        used = at[mask]
        if used.numel():
            low, high = int(used.min()), int(used.max())
            assert 0 <= low <= high < self.memory.numel(), f"{low} to {high} of {self.memory.numel()} numbers"
        return at.flatten(), mask.flatten(), at.shape

    def load(self, mask, other=0.0):
        at, mask, shape = self.places(mask)
        values = torch.full(at.shape, other, dtype=self.memory.dtype)
        values[mask] = self.memory[at[mask]]
        return values.reshape(shape)

    def store(self, value, mask):
        at, mask, shape = self.places(mask)
        value = value.data.broadcast_to(shape).flatten().to(self.memory.dtype)
        self.memory[at[mask]] = value[mask]


def pointer(value) -> bool:
    return isinstance(value, Pointer)


class Shared:
    """A tile of shared memory; its views share all but the order of columns, and which of its rows they are."""

    within = slice(None)

    def __init__(self, shape, dtype, value=None):
        self.data = torch.full(shape, math.nan).to(TORCH_DTYPES[dtype])
        self.dtype, self.turned, self.owner = dtype, False, self
        self.made = self.used = program.tick()
        self.written, self.fenced, self.copying = False, True, False
        self.readers, self.slots = [], None
        program.shared.append(self)
        if value is not None:
            self.store(value)

    def index(self, slot):
        """One of the tiles that were allocated under this name."""
        if self.slots is None:
            self.slots = [Shared(self.data.shape[1:], self.dtype) for _ in range(len(self.data))]
        return self.slots[int(slot.data if isinstance(slot, Tensor) else slot)]

    def slice(self, start, length):
        """Some of a vector, to be read."""
        part = object.__new__(Shared)
        part.dtype, part.turned, part.owner, part.within = self.dtype, False, self.owner, slice(start, start + length)
        return part

    def permute(self, order):
        assert tuple(order) == (1, 0), order
        view = object.__new__(Shared)
        view.dtype, view.turned, view.owner = self.dtype, not self.turned, self.owner
        return view

    def touch(self):
        self.owner.used = program.tick()

    def _keep_alive(self):
        self.touch()

    def check_readable(self):
        self.touch()
        assert self.owner.written, "shared memory is read before anything was written to it"
        assert not self.owner.copying, "shared memory is read before its copy was waited for"

    def numbers(self) -> torch.Tensor:
        return self.owner.data.T if self.turned else self.owner.data

    def load(self, layout):
        self.check_readable()
        return Tensor(self.numbers()[self.within].clone())

    def store(self, value):
        assert value.dtype == self.dtype, f"{value.dtype} stored to {self.dtype}"
        assert value.data.shape == self.owner.data.shape, f"{value.shape} stored to {self.owner.data.shape}"
        self.write(value.data)

    def write(self, data):
        self.touch()
        assert not self.owner.readers, "shared memory is written over while a product may still read it"
        self.owner.data = data.clone()
        self.owner.written, self.owner.fenced = True, False


class Passed:
    """A tile as a wait for products returns it: no name to use, because the compiler then loses track of the tile."""

    def __getattr__(self, name):
        raise AssertionError("a tile is used by the name that a wait for products gave it")


class Product:
    """A product that was started: a number only for another product to add to, until it was waited for."""

    def __init__(self, left, right, before, use_acc):
        for operand in (left, right):
            if isinstance(operand, Shared):
                operand.check_readable()
                assert operand.owner.fenced, "a product of shared memory that was written since the last fence"
                operand.owner.readers.append(self)
        self.left, self.right, self.before = left, right, before if use_acc else None
        self.shape = list(before.shape)
        self.value = None
        program.tick()

    def __getattr__(self, name):
        raise AssertionError("a product is used before it was waited for")

    def finish(self):
        left, right = (o.numbers() if isinstance(o, Shared) else o.data for o in (self.left, self.right))
        assert left.dtype == right.dtype, f"a product of {left.dtype} and {right.dtype}"
        value = left.float() @ right.float()
        if self.before is not None:
            value = value + (self.before.value if isinstance(self.before, Product) else self.before.data)
        assert list(value.shape) == self.shape, f"a product of shape {tuple(value.shape)} added to {self.shape}"
        self.value, now = value, program.tick()
        for operand in (self.left, self.right):
            if isinstance(operand, Shared):
                owner = operand.owner
                owner.readers = [reader for reader in owner.readers if reader is not self]
                program.read_until.append((owner, now))


class Program:
    """One program of a launch: its place in the grid, and what it has started and not waited for."""

    def __init__(self, place, grid):
        self.place, self.grid = place, grid
        self.clock = itertools.count()
        self.shared, self.read_until = [], []
        self.copies, self.groups, self.products = [], [], []

    def tick(self) -> int:
        return next(self.clock)

    def end(self):
        assert not self.copies + self.groups, "a copy that was never waited for"
        assert not self.products, "a product that was never waited for"
        for tile, until in self.read_until:
            for other in self.shared:
                assert not tile.used < other.made < until, (
                    "a tile is last named before the product that reads it is through, and memory is allocated between"
                )


program: Program


class Function:
    """What `gluon.jit` makes: to be called by other such functions, or launched on a grid."""

    def __init__(self, fn):
        if "tl" in fn.__globals__:  # written for Triton
            fn = types.FunctionType(fn.__code__, fn.__globals__ | {"tl": language})
        self.fn, self.__doc__ = fn, fn.__doc__

    def __call__(self, *args, **kwargs):
        return self.fn(*args, **kwargs)

    def __getitem__(self, grid):
        return lambda *args, **options: self.launch(grid, args, options)

    def launch(self, grid, args, options):
        global program
        constants = {name: value for name, value in options.items() if name.isupper()}
        grid = (*grid, 1, 1)[:3]
        for place in itertools.product(*map(range, grid)):
            program = Program(place, grid)
            self.fn(*map(argument, args), **constants)
            program.end()


def argument(value):
    """A launch's argument as the kernel sees it."""
    if torch.is_tensor(value):
        memory = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
        return Pointer(memory, torch.tensor(value.storage_offset()))
    return Tensor(torch.tensor(value, dtype=torch.int32)) if isinstance(value, int) else value


def jit(fn=None, **options):
    return Function(fn) if fn is not None else Function


def load(at, mask=None, other=0.0):
    return Tensor(at.load(mask, other))


def store(at, value, mask=None):
    at.store(value, mask)


def unary(function):
    return lambda tile: Tensor(function(tile.data))


ASSEMBLER = {
    "mov.b32": lambda tile: tile,
    "prmt.b32": unary(lambda numbers: (numbers.int() & 0xFFFF).float() + 2.0**23),
    "shl.b32": unary(lambda numbers: numbers.float()),
    "cvt.rn.bf16x2.f32": unary(lambda numbers: numbers.bfloat16().float()),
    "ex2.approx.ftz.f32": unary(torch.exp2),
    "rcp.approx.ftz.f32": unary(torch.reciprocal),
    "cos.approx.ftz.f32": unary(torch.cos),
    "sin.approx.ftz.f32": unary(torch.sin),
}


def inline_asm_elementwise(asm, constraints, args, dtype, is_pure, pack):
    if "prefetch" in asm:
        count = args[1] * 8 // args[0].dtype.element_ty.primitive_bitwidth if len(args) > 1 else 1
        (args[0] + (count - 1)).places(None), args[0].places(None)
        return None
    if "shfl.sync.bfly" in asm:
        return exchanged(*args)
    result = ASSEMBLER[asm.split()[0]](args[0])
    assert result.dtype == dtype, f"{asm} of {result.dtype} as {dtype}"
    return result


def exchanged(first, second, bit):
    """What threads that hold ranks a bit apart keep of sums of two: see `exchange` in `kernels/hopper/memory.py`."""
    partner = torch.arange(first.shape[1]) ^ int(bit.data.max())
    halves = [(tile.data + tile.data[:, partner]) for tile in (first, second)]
    return Tensor(torch.where(bit.data > 0, halves[1], halves[0]))


def where(condition, one, other):
    values = [value.data if isinstance(value, Tensor) else torch.tensor(float(value)) for value in (one, other)]
    return Tensor(torch.where(condition.data, *values))


def total(tile, axis):
    return Tensor(tile.data.sum(axis))


def warpgroup_mma(a, b, acc, use_acc=True, is_async=False):
    assert is_async, "products are started, and waited for"
    program.products.append(Product(a, b, acc, use_acc))
    return program.products[-1]


def warpgroup_mma_wait(pending, deps):
    while len(program.products) > pending:
        program.products.pop(0).finish()
    passed = []
    for value in deps:
        if isinstance(value, Shared):
            value.touch()
            passed.append(Passed())
        else:
            assert value.value is not None, "a product is waited for that may still be under way"
            passed.append(Tensor(value.value))
    return passed if len(passed) > 1 else passed[0]


def async_copy_global_to_shared(tile, at, mask=None):
    values = at.load(mask)
    assert values.shape == tile.data.shape, f"{tuple(values.shape)} copied to {tuple(tile.data.shape)}"
    tile.copying = tile.written = True
    program.copies.append((tile, values))


def commit_group():
    program.groups.append(program.copies)
    program.copies = []


def wait_group(pending):
    while len(program.groups) > pending:
        for tile, values in program.groups.pop(0):
            tile.copying = False
            tile.write(values)


def fence_async_shared():
    for tile in program.shared:
        tile.fenced = True


def ignored(*args, **kwargs):
    """A layout."""


def namespace(**members):
    return types.SimpleNamespace(**members)


language = namespace(
    constexpr=tl.constexpr, tensor=Tensor, float32=tl.float32, bfloat16=tl.bfloat16,
    int64=tl.int64, int32=tl.int32, int16=tl.int16,
    program_id=lambda axis: Tensor(torch.tensor(program.place[axis], dtype=torch.int32)),
    num_programs=lambda axis: Tensor(torch.tensor(program.grid[axis], dtype=torch.int32)),
    static_range=range,
    arange=lambda start, end, layout: Tensor(torch.arange(start, end, dtype=torch.int32)),
    zeros=lambda shape, dtype, layout: Tensor(torch.zeros(shape, dtype=TORCH_DTYPES[dtype])),
    load=load, store=store, where=where, sum=total, inline_asm_elementwise=inline_asm_elementwise,
    reshape=lambda tile, shape: Tensor(tile.data.reshape(shape)),
    permute=lambda tile, order: Tensor(tile.data.permute(order)),
    split=lambda tile: (Tensor(tile.data[..., 0]), Tensor(tile.data[..., 1])),
    join=lambda one, other: Tensor(torch.stack((one.data, other.data), dim=-1)),
    convert_layout=lambda tile, layout, assert_trivial=False: tile,
    minimum=binary(lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b))),
    maximum=binary(lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b))),
    rsqrt=unary(torch.rsqrt),
    fma=lambda one, other, third: Tensor((one.data.double() * other + third).float()),
    allocate_shared_memory=lambda dtype, shape, layout, value=None: Shared(shape, dtype, value),
    BlockedLayout=ignored, SliceLayout=ignored, NVMMADistributedLayout=ignored, DotOperandLayout=ignored,
    DistributedLinearLayout=ignored, SwizzledSharedLayout=ignored, SharedLinearLayout=ignored,
    NVMMASharedLayout=namespace(get_default_for=ignored),
)  # fmt: skip
copies = namespace(
    async_copy_global_to_shared=async_copy_global_to_shared, commit_group=commit_group, wait_group=wait_group
)
products = namespace(
    async_copy=copies, fence_async_shared=fence_async_shared, warpgroup_mma=warpgroup_mma,
    warpgroup_mma_wait=warpgroup_mma_wait,
)  # fmt: skip
gluon = namespace(jit=jit, constexpr_function=lambda function: function, language=language)


def interpreted(package: str):
    """Import a package of Gluon kernels once more, so that its kernels run here; launched as always."""
    names = [name for name in sys.modules if name.startswith(package)]
    parent, _, child = package.rpartition(".")
    before = getattr(sys.modules.get(parent), child, None)
    prefix = "triton.experimental"
    replaced = {
        prefix: namespace(gluon=gluon), f"{prefix}.gluon": gluon, f"{prefix}.gluon.language": language,
        f"{prefix}.gluon.language.nvidia.hopper": products,
    }  # fmt: skip
    with mock.patch.dict(sys.modules, replaced):
        for name in names:
            del sys.modules[name]
        found = importlib.import_module(package)
    if before is not None:
        setattr(sys.modules[parent], child, before)
    return found
