"""Compile every Triton kernel on a machine without a GPU and print what the compiler made of it.

    python tools/compile_kernels.py                                  # all sizes below, for Hopper: minutes
    python tools/compile_kernels.py siso mimo4                       # some
    python tools/compile_kernels.py siso_wide --arch 89 --chunk 16   # for another GPU, in other chunks than the table's

The launches are the real ones: the scan and the decode step run on meta tensors and each launch is compiled instead of
made. One line of JSON a kernel: registers, stores that spill, shared memory, faults in its code (see
`launch.wrong_descriptors`), and of its longest loop, or all of it where there is none, the instructions and the cycles
that a warp needs for them at least: what the assembler has it wait after each, without waits for memory, barriers and
other units. Exits with 1 if a kernel has a fault or needs more shared memory than a block has on that GPU.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from mamba3_train.kernels import StepState, decode_step, launch, triton_scan
from mamba3_train.kernels import sizes as scan_sizes
from mamba3_train.kernels.inputs import Inputs
from mamba3_train.kernels.launch import wrong_descriptors

# KiB a block may have, by compute capability (CUDA C++ programming guide, technical specifications).
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int16: "*i16", torch.int32: "*i32",
}  # fmt: skip
# The 1.5B layer unless said otherwise.
LAYER = {"heads": 64, "head_dim": 64, "d_state": 128, "rank": 1, "pairs": 32, "dtype": torch.bfloat16}
SIZES = {
    "siso": LAYER,
    "mimo4": LAYER | {"rank": 4},
    "siso_columns": LAYER | {"columns": 8672},
    "mimo4_columns": LAYER | {"rank": 4, "columns": 9440},
    "siso_documents_norm": LAYER | {"documents": True, "norm": True},
    "mimo4_documents_norm": LAYER | {"rank": 4, "documents": True, "norm": True},
    "mimo2": LAYER | {"rank": 2},
    "mimo8": LAYER | {"rank": 8},
    "siso_full_rotation": LAYER | {"pairs": 64},
    "siso_no_rotation": LAYER | {"pairs": 0},
    "siso_180M": LAYER | {"heads": 24},
    "siso_float16": LAYER | {"dtype": torch.float16},
    "siso_float32": LAYER | {"dtype": torch.float32},
    "mimo4_float32": LAYER | {"rank": 4, "dtype": torch.float32},
    "siso_64": LAYER | {"d_state": 64, "pairs": 16},
    "mimo4_64": LAYER | {"rank": 4, "d_state": 64, "pairs": 16},
    "mimo2_80": LAYER | {"rank": 2, "d_state": 80},
    "siso_narrow": LAYER | {"head_dim": 32, "d_state": 64, "pairs": 16},
    "siso_wide": LAYER | {"head_dim": 128, "d_state": 256, "pairs": 64},
    "mimo4_wide": LAYER | {"head_dim": 128, "d_state": 256, "pairs": 64, "rank": 4},
    "siso_wide_float32": LAYER | {"head_dim": 128, "d_state": 256, "pairs": 64, "dtype": torch.float32},
}


def meta_inputs(heads, head_dim, d_state, rank, pairs, dtype, documents=False, norm=False, columns=0):
    """columns: x and z are columns of a projection of that width, as in the model, not tensors of their own."""
    batch, seqlen = 2, 4096  # several spans of a walk

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    per_token = (batch, seqlen, heads)
    shared = (batch, seqlen, rank, 1, d_state)
    inner = heads * head_dim
    x = empty(batch, seqlen, columns or inner, dtype=dtype)[..., :inner].unflatten(-1, (heads, head_dim))
    mimo = [empty(heads, rank, head_dim) if rank > 1 else None for _ in range(3)]
    return Inputs(
        x, empty(*shared, dtype=dtype), empty(*shared, dtype=dtype), empty(*per_token),
        empty(*per_token), empty(*per_token, dtype=dtype), empty(batch, seqlen, pairs, dtype=dtype) if pairs else None,
        empty(heads, rank, d_state), empty(heads, rank, d_state), empty(heads), x, *mimo,
        empty(heads, head_dim) if norm else None, empty(batch, seqlen, dtype=torch.int32) if documents else None, None,
    )  # fmt: skip


def decode(inputs):
    """One token of these inputs through the decode step, with a bfloat16 state for 16-bit inputs."""
    per_token = ("x", "B", "C", "dt", "A", "trap", "angles", "z")
    token = {n: t[:, :1] if n in per_token and t is not None else t for n, t in inputs._asdict().items()}
    x, B = token["x"], token["B"]
    ssm = torch.float32 if x.dtype == torch.float32 else torch.bfloat16
    ssm = x.new_empty((x.shape[0], *x.shape[2:], B.shape[-1]), dtype=ssm)
    state = StepState(ssm, B[:, 0].contiguous(), x[:, 0].contiguous())
    decode_step.decode_token(Inputs(**token | {"document_ids": None}), state, 1e-5)


def compile_launch(kernel, args, options, arch):
    """Compile one launch as the runtime would, its pointers taken to be aligned."""
    names = kernel.arg_names
    settings = {name: options.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in options}
    values = dict(zip(names, args, strict=False)) | options
    constants, signature, aligned = {}, {}, {}
    for i, name in enumerate(names):
        value = values[name]
        if torch.is_tensor(value):
            signature[name], aligned[(i,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        elif value is None or name in options:
            signature[name], constants[(i,)] = "constexpr", value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    language = GluonASTSource if kernel.is_gluon() else ASTSource
    source = language(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=settings)


# Control codes of a line of machine code, the last of them the cycles to the next instruction, and the instruction.
INSTRUCTION = re.compile(r"^\s*(?:[0-9a-f]{2}|--)(?::[0-9-]){2}:[Y-]:([0-9a-f-])\t(.*)$")


def longest_loop(sass):
    """(instructions, cycles) of the longest loop in a kernel's machine code, of all of it without one."""
    cycles, labels, loops = [], {}, []
    for line in sass.splitlines():
        if found := INSTRUCTION.match(line):
            cycles.append(max(1, int(found[1].replace("-", "0"), 16)))
            target = re.search(r"\bBRA (\w+)", found[2])
            start = labels.get(target[1], len(cycles)) if target else len(cycles)
            if start < len(cycles) - 1:  # not the endless one behind the kernel
                loops.append(cycles[start:])
        elif label := re.match(r"(\w+):", line):
            labels[label[1]] = len(cycles)
    loop = max(loops, key=len, default=cycles)
    return len(loop), sum(loop)


def report(compiled):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    sass = compiled.asm["sass"]
    instructions, cycles = longest_loop(sass)
    return {
        "registers": max(int(n) for n in re.findall(r"\bREG:(\d+)", usage)),
        "spills": len(re.findall(r"\bSTL\b", sass)),
        "shared": compiled.metadata.shared,
        "faults": wrong_descriptors(sass),
        "instructions": instructions,
        "cycles": cycles,
    }


def main(sizes, arch, chunk, kernels):
    seen, failed = set(), []

    def compile_instead(kernel, grid, *args, **options):
        types = [(a.dtype, None) if torch.is_tensor(a) else (None, a is None) for a in args]
        key = (kernel.fn.__name__, str(types), str(sorted(options.items())))
        if key not in seen and kernel.fn.__name__.startswith(kernels):
            seen.add(key)
            line = {"size": size, "kernel": kernel.fn.__name__, **report(compile_launch(kernel, args, options, arch))}
            print(json.dumps(line), flush=True)
            if line["faults"] or line["shared"] > SHARED_MEMORY[arch] * 1024:
                failed.append(line)

    launch.run = decode_step.run = compile_instead
    if arch < 90:
        scan_sizes.programs_ahead = lambda device: 0
    scan_sizes.shared_memory = lambda device: SHARED_MEMORY[arch]
    on_hopper = scan_sizes.runs_on_hopper
    gears = ("portable", "hopper", "hopper, whole sequences, all states kept") if arch == 90 else ("portable",)
    for size, gear in itertools.product(sizes, gears):
        scan_sizes.runs_on_hopper = on_hopper if "hopper" in gear else lambda *_: False
        scan_sizes.FEWEST_WALKS = 1 if "whole" in gear else 1 << 30
        scan_sizes._known.cache_clear()
        inputs = meta_inputs(**SIZES[size])
        for keep in ("scales", "states", "outputs") if "kept" in gear else ("scales",):
            _, last, kept = triton_scan.scan_forward(inputs, 1e-5, keep=keep, launch=chunk)
            triton_scan.scan_backward(inputs, 1e-5, inputs.x.contiguous(), last, kept, chunk)
        decode(inputs)
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", choices=[*SIZES, []], default=list(SIZES), metavar="SIZE")
    parser.add_argument("--arch", type=int, choices=SHARED_MEMORY, default=90, help="compute capability, without a dot")
    parser.add_argument("--chunk", type=int, default=0, help="tokens of a chunk; 0: the table's")
    parser.add_argument("--kernels", default="", metavar="NAME", help="only those whose names begin so")
    arguments = parser.parse_args()
    sys.exit(main(arguments.sizes, arguments.arch, arguments.chunk, arguments.kernels))
