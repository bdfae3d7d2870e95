"""Where the time of a training step goes on a GPU: by part, beside the least that the part's work can take.

    python tools/profile_step.py +recipe=1.5b_mimo data.global_batch_size=8 data.micro_batch_size=8 data.path=x
    python tools/profile_step.py --trace runs/NAME/profile/steps-10-12.trace.json.gz --steps 3 +recipe=…

The first runs the recipe's step on random tokens, as `benchmark_step.py` does, and profiles some; the second reads what
a run with `profile=[10,12]` wrote. The least is the larger of FLOPs and bytes over what this GPU reaches on a large
bfloat16 matrix product and a large copy, measured here; without a GPU, or with --ceilings, over what is given. Under
torchrun every process prints what its own GPU waited for:

    torchrun --nproc-per-node 2 tools/profile_step.py +recipe=440m_siso strategy=fsdp trainer.devices=2 …
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from hydra.utils import instantiate
from rich.console import Console
from rich.table import Table
from step_parts import (
    Kernel,
    idle_milliseconds,
    least_work,
    milliseconds_by_kernel,
    milliseconds_by_part,
    read_trace,
    recorded,
)

from mamba3_train.config import compose
from mamba3_train.model.cost import model_cost
from mamba3_train.training import process_end, processes


def main() -> None:
    """Profile or read, and print the tables; with --json also write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="read this trace instead of running")
    parser.add_argument("--steps", type=int, default=1, help="steps that are profiled, or that the trace holds")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--kernels", type=int, default=15, help="list this many kernels")
    parser.add_argument(
        "--ceilings", type=float, nargs=2, metavar=("TFLOPS", "TB_PER_S"), help="what the GPU reaches; else measured"
    )
    parser.add_argument("--json", type=Path, help="file to write the result to")
    arguments, overrides = parser.parse_known_args()
    if arguments.trace is None and not torch.cuda.is_available():
        sys.exit("error: there is no GPU here to profile a step on; read a trace by --trace FILE")
    if arguments.ceilings is None and not torch.cuda.is_available():
        sys.exit("error: there is no GPU here to measure ceilings on; give --ceilings TFLOPS TB_PER_S")
    config = compose(*overrides)
    kernels = read_trace(arguments.trace) if arguments.trace else profile_steps(config, overrides, arguments)
    if not kernels:
        sys.exit(f"error: {arguments.trace or 'the profile'} holds no GPU kernel")
    if processes.rank():
        idle = {name: f"{ms / arguments.steps:.1f} ms" for name, ms in idle_milliseconds(kernels).items()}
        print(f"rank {processes.rank()}, a step: {idle}")
        return
    flops, bandwidth = arguments.ceilings or measured_ceilings()
    result = {
        "command": " ".join(["python tools/profile_step.py", *overrides]),
        "teraflops": flops,
        "terabytes_per_second": bandwidth,
        "parts": summarise(config, kernels, arguments.steps, flops, bandwidth),
        "kernels": [
            {"name": name, "calls": calls / arguments.steps, "ms": ms / arguments.steps}
            for name, calls, ms in milliseconds_by_kernel(kernels)[: arguments.kernels]
        ],
    }
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def profile_steps(config, overrides: list[str], arguments) -> list[Kernel]:
    """Run the recipe's step on random tokens and profile the last ones."""
    from benchmark_step import run_steps

    timer = run_steps(config, arguments.warmup + arguments.steps, profiled=arguments.steps)
    return recorded(timer.profile)


def measured_ceilings() -> tuple[float, float]:
    """TFLOP/s of an 8192³ bfloat16 matrix product on random numbers, and TB/s of a copy of 2 GiB, of this GPU."""
    from triton.testing import do_bench

    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    block = torch.empty(1 << 31, device="cuda", dtype=torch.uint8)
    other = torch.empty_like(block)
    product_ms = do_bench(lambda: matrix @ matrix, return_mode="median")
    copy_ms = do_bench(lambda: other.copy_(block), return_mode="median")
    return 2 * 8192**3 / product_ms / 1e9, 2 * block.numel() / copy_ms / 1e9


def summarise(config, kernels: list[Kernel], steps: int, teraflops: float, terabytes: float) -> dict[str, dict]:
    """Of every part: milliseconds a step, share of the step, least milliseconds (None where that is not plain)."""
    model = instantiate(config.model)
    tokens = config.data.global_batch_size * config.data.sequence_length
    least = least_work(model, model_cost(model, config.data.sequence_length), tokens)
    begin, end = min(k.begin for k in kernels), max(k.begin + k.duration for k in kernels)
    step_ms = (end - begin) / 1e3 / steps
    parts = {part: ms / steps for part, ms in milliseconds_by_part(kernels).items()}
    parts |= {name: ms / steps for name, ms in idle_milliseconds(kernels).items()}
    found = {}
    for part, ms in parts.items():
        flops, moved = least.get(part, (0.0, 0.0))
        floor = max(flops / teraflops, moved / terabytes) / 1e9
        found[part] = {"ms": ms, "share": ms / step_ms, "least_ms": floor or None}
    return found | {"step": {"ms": step_ms, "share": 1.0, "least_ms": None}}


def show(result: dict) -> None:
    """Print both tables."""
    console = Console(highlight=False)
    title = f"ceilings: {result['teraflops']:,.0f} TFLOP/s, {result['terabytes_per_second']:.2f} TB/s"
    table = Table("part", title=title, title_justify="left")
    for column in ("ms a step", "share", "least, ms"):
        table.add_column(column, justify="right")
    for part, row in result["parts"].items():
        least = "" if row["least_ms"] is None else f"{row['least_ms']:.1f}"
        table.add_row(part, f"{row['ms']:.1f}", f"{row['share']:.1%}", least)
    console.print(table)
    table = Table("kernel", title="the longest kernels", title_justify="left")
    for column in ("calls a step", "ms a step"):
        table.add_column(column, justify="right")
    for row in result["kernels"]:
        table.add_row(row["name"][:90], f"{row['calls']:g}", f"{row['ms']:.2f}")
    console.print(table)


if __name__ == "__main__":
    with process_end.at_once():
        main()
