"""Time the scan of the 1.5B layer on one GPU: forward and backward, memory, first call; beside ceilings and attention.

    python tools/benchmark_kernels.py                      # the table
    python tools/benchmark_kernels.py --lengths            # also 1k to 256k at 262,144 tokens
    python tools/benchmark_kernels.py --output result.json

Bytes and FLOPs are the least the layer needs (docs/kernels.md), so a share says how far from the machine's measured
ceilings the whole scan is. Public kernels are timed beside ours where mamba_ssm can be imported.
"""

import argparse
import datetime
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp())  # empty, so that the first call is a first call

import torch
import torch.nn.functional as F
import triton

from mamba3_train.kernels import mamba3_scan

HEADS, HEAD_DIM, D_STATE, PAIRS = 64, 64, 128, 32
SHAPES = ((8, 2048), (2, 8192), (1, 16384))


def layer_inputs(batch, seqlen, rank, head_dim=HEAD_DIM, d_state=D_STATE, half=torch.bfloat16):
    """Tensors as the 1.5B mixer makes them: 16-bit activations, float32 steps, decays and weights."""
    torch.manual_seed(0)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(*shape, device="cuda").to(dtype)

    wide, shared = (batch, seqlen, HEADS, head_dim), (batch, seqlen, rank, 1, d_state)
    log_step = torch.empty(HEADS, device="cuda").uniform_(-6.9, -2.3)
    decay = normal(batch, seqlen, HEADS)
    inputs = {
        "x": normal(*wide, dtype=half),
        "B": normal(*shared, dtype=half),
        "C": normal(*shared, dtype=half),
        "dt": F.softplus(0.5 * normal(batch, seqlen, HEADS) + log_step.exp().expm1().log()),
        "A": -torch.where(decay >= 0, 1 + decay, 1 / (1 - decay)),
        "trap": normal(batch, seqlen, HEADS, dtype=half),
        "angles": normal(batch, seqlen, d_state // 4, dtype=half),
        "B_bias": torch.ones(HEADS, rank, d_state, device="cuda"),
        "C_bias": torch.ones(HEADS, rank, d_state, device="cuda"),
        "D": torch.ones(HEADS, device="cuda"),
        "z": normal(*wide, dtype=half),
    }
    if rank > 1:
        inputs |= {name: normal(HEADS, rank, head_dim) / rank for name in ("mimo_x", "mimo_z", "mimo_o")}
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def least_work(tokens, rank, chunk):
    """FLOPs and bytes of forward and backward: scores of one chunk, each tensor read and written once."""
    n, p, r = D_STATE, HEAD_DIM, rank
    flops = 2 * chunk * r * r * (n + p) + 4 * r * n * p, 2 * chunk * r * r * (3 * n + 2 * p) + 8 * r * n * p
    shared = (4 * r * n + 2 * PAIRS) / HEADS
    moved = 6 * p + 10 + shared, 10 * p + 20 + 2 * shared
    return [tokens * HEADS * f for f in flops], [tokens * HEADS * b for b in moved]


def median_ms(function):
    """Median time on the device, the L2 cache flushed before each call."""
    return triton.testing.do_bench(function, warmup=50, rep=200, return_mode="median")


def time_pair(forward, leaves):
    """Median milliseconds of forward and backward, and the peak of memory above the inputs, in MiB."""
    y = forward()
    d_y = torch.randn_like(y)
    torch.autograd.grad(y, leaves, d_y)
    del y
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(forward(), leaves, d_y)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    y = forward()
    backward = median_ms(lambda: torch.autograd.grad(y, leaves, d_y, retain_graph=True))
    return {"forward_ms": median_ms(forward), "backward_ms": backward, "peak_mib": round(peak)}


def time_scan(batch, seqlen, rank, ceilings, backend="triton"):
    inputs = layer_inputs(batch, seqlen, rank)
    torch.cuda.synchronize()
    start = time.perf_counter()
    y = mamba3_scan(**inputs, backend=backend)
    torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    del y
    row = {"kernel": f"{backend} rank {rank}", "batch": batch, "seqlen": seqlen, "first_call_s": round(first, 2)}
    row |= time_pair(lambda: mamba3_scan(**inputs, backend=backend), list(inputs.values()))
    row["sum_ms"] = row["forward_ms"] + row["backward_ms"]
    flops, moved = (sum(pair) for pair in least_work(batch * seqlen, rank, 64 // rank))
    row["tflops"] = flops / row["sum_ms"] / 1e9
    row["gb_per_s"] = moved / row["sum_ms"] / 1e6
    row["share_of_ceiling"] = max(row["tflops"] / ceilings["tflops"], row["gb_per_s"] / ceilings["gb_per_s"])
    return row


def time_attention(batch, seqlen):
    q, k, v = (torch.randn(batch, 32, seqlen, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in "qkv")
    row = {"kernel": "causal attention 32 × 64", "batch": batch, "seqlen": seqlen}
    row |= time_pair(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), [q, k, v])
    return row | {"sum_ms": row["forward_ms"] + row["backward_ms"]}


def measure_ceilings():
    """Copy bandwidth (bytes read and written) and the rate of a large bfloat16 matrix product."""
    source = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    gb_per_s = 2 * 2 * 2**30 / median_ms(lambda: target.copy_(source)) / 1e6
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return {"gb_per_s": gb_per_s, "tflops": 2 * 8192**3 / median_ms(lambda: a @ b) / 1e9}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", action="store_true", help="also 1k to 256k tokens a row at 262,144 tokens in all")
    parser.add_argument("--reference", action="store_true", help="also the PyTorch reference")
    parser.add_argument("--output", help="write everything as JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: there is no GPU here to time kernels on")
    ceilings = measure_ceilings()
    rows = [time_scan(*shape, rank, ceilings) for rank in (1, 4) for shape in SHAPES]
    if arguments.lengths:
        rows += [time_scan(2**18 // n, n, rank, ceilings) for rank in (1, 4) for n in (2**10, 2**14, 2**18)]
    if arguments.reference:
        rows += [time_scan(*SHAPES[0], rank, ceilings, "reference") for rank in (1, 4)]
    rows += [time_attention(*shape) for shape in SHAPES]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    result = {
        "commit": commit, "date": datetime.date.today().isoformat(), "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__, "triton": triton.__version__, "layer": [HEADS, HEAD_DIM, D_STATE, PAIRS],
        "mamba_ssm": importlib.util.find_spec("mamba_ssm") is not None, "ceilings": ceilings, "rows": rows,
    }  # fmt: skip
    if arguments.output:
        with open(arguments.output, "w") as file:
            json.dump(result, file, indent=1)
    print(f"{result['gpu']}: copy {ceilings['gb_per_s']:.0f} GB/s, matmul {ceilings['tflops']:.0f} TFLOP/s")
    columns = (
        "forward_ms",
        "backward_ms",
        "sum_ms",
        "peak_mib",
        "tflops",
        "gb_per_s",
        "share_of_ceiling",
        "first_call_s",
    )
    print(f"{'kernel':26}{'batch × seqlen':>14}", *(f"{column:>12}" for column in columns))
    for row in rows:
        values = (f"{row[column]:12.3f}" if column in row else f"{'':12}" for column in columns)
        print(f"{row['kernel']:26}{row['batch']:>5} × {row['seqlen']:<6}", *values)


if __name__ == "__main__":
    main()
