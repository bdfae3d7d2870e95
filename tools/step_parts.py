"""The GPU kernels of a training step by the part they belong to, and the least time that each part's work takes."""

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mamba3_train.model import Mamba3Config
from mamba3_train.model.cost import Cost

# Part of a step by words in the name of a GPU kernel; the first that matches counts.
PARTS = {
    "scan": ("chunk_", "_walk_kernel", "state_passing", "span_", "token_scales", "head_sum", "gate_backward"),
    "loss": ("cross_entropy", "softmax", "SoftMax", "nll_loss"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas"),
    "attention": ("flash", "fmha", "attention"),
    "optimizer": ("multi_tensor", "adam", "foreach"),
    "norms": ("rms_norm", "layer_norm", "RMSNorm", "LayerNorm"),
    "communication": ("nccl",),
    "copies": ("Memcpy", "Memset", "copy_kernel", "CatArray"),
}
REST = "elementwise and rest"
# Calls of the host that start something on the GPU.
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaMemcpy", "cudaMemset", "cudaGraphLaunch")


@dataclass(frozen=True)
class Kernel:
    """One kernel, copy or fill on a GPU: begin, duration and, if known, when the host launched it, in microseconds."""

    name: str
    begin: float
    duration: float
    launched: float | None = None


def part_of(name: str) -> str:
    """The part of a step that a kernel belongs to."""
    return next((part for part, words in PARTS.items() if any(word in name for word in words)), REST)


def recorded(profile) -> list[Kernel]:
    """Kernels of a `torch.profiler.profile` that has stopped, without the spans that PyTorch names among them."""
    events = profile.events()
    launched = {event.id: event.time_range.start for event in events if event.name.startswith(LAUNCHES)}
    on_gpu = (event for event in events if "CUDA" in str(event.device_type))
    return [
        Kernel(event.name, event.time_range.start, event.time_range.elapsed_us(), launched.get(event.id))
        for event in on_gpu
        if not event.is_user_annotation
    ]


def read_trace(path: Path) -> list[Kernel]:
    """Kernels of a trace as `profile=[first,last]` of a run writes it."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    events = json.loads(text)["traceEvents"]
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event["name"].startswith(LAUNCHES) and "correlation" in event.get("args", {})
    }
    on_gpu = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    return [
        Kernel(event["name"], event["ts"], event["dur"], launched.get(event.get("args", {}).get("correlation")))
        for event in on_gpu
    ]


def milliseconds_by_part(kernels: Iterable[Kernel]) -> dict[str, float]:
    """GPU time of every part; kernels that run side by side count in full."""
    parts = dict.fromkeys([*PARTS, REST], 0.0)
    for kernel in kernels:
        parts[part_of(kernel.name)] += kernel.duration / 1e3
    return parts


def milliseconds_by_kernel(kernels: Iterable[Kernel]) -> list[tuple[str, int, float]]:
    """Name, number and GPU time of every kernel, the longest first."""
    found = defaultdict(list)
    for kernel in kernels:
        found[kernel.name].append(kernel.duration / 1e3)
    return sorted(((name, len(times), sum(times)) for name, times in found.items()), key=lambda row: -row[2])


def idle_milliseconds(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Time in which no kernel but of communication ran, by what the next one waited for.

    The host, until it had launched it; then communication, while that ran; the rest is what lies between kernels
    anyway, and all of it where launches are not known.
    """
    ordered = sorted(kernels, key=lambda kernel: kernel.begin)
    communication = [kernel for kernel in ordered if part_of(kernel.name) == "communication"]
    idle = {"idle: host is late": 0.0, "idle: communication": 0.0, "idle: other": 0.0}
    until = None
    for kernel in ordered:
        if part_of(kernel.name) == "communication":
            continue
        if until is not None and kernel.begin > until:
            launched = until if kernel.launched is None else min(max(kernel.launched, until), kernel.begin)
            waited = _overlap(communication, launched, kernel.begin)
            idle["idle: host is late"] += (launched - until) / 1e3
            idle["idle: communication"] += waited / 1e3
            idle["idle: other"] += (kernel.begin - launched - waited) / 1e3
        until = max(kernel.begin + kernel.duration, until or 0.0)
    return idle


def _overlap(ordered: list[Kernel], begin: float, end: float) -> float:
    """Microseconds between begin and end in which one of these kernels, ordered by their beginning, ran."""
    covered, until = 0.0, begin
    for kernel in ordered:
        stop = min(kernel.begin + kernel.duration, end)
        covered += max(0.0, stop - max(kernel.begin, until))
        until = max(until, stop)
    return covered


def least_work(config: Mamba3Config, cost: Cost, tokens: int) -> dict[str, tuple[float, float]]:
    """FLOPs and bytes that a step on one GPU cannot do without, of the parts where that is plain.

    Matrix products and attention: their FLOPs. Scan: its FLOPs; x, z, y read and written once forward, x, z, their
    gradients and y's once backward, in 16 bit. Optimizer: float32 parameter, gradient and two moments read, all but
    the gradient written; for the norm the gradient is read once more.
    """
    flops = {part: 3 * tokens * value for part, value in cost.forward_flops.items()}
    inner = config.mixer.heads(config.d_model) * config.mixer.head_dim
    scan_bytes = config.layers.count("M") * tokens * 8 * 2 * inner
    return {
        "matrix products": (flops["projections"] + flops["mlp"] + flops["head"], 0.0),
        "scan": (flops["scan"], scan_bytes),
        "attention": (flops["attention"], 0.0),
        "optimizer": (0.0, 32.0 * cost.total_parameters),
    }
