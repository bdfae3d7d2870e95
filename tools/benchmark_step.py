"""Time a recipe's full training step on random tokens: tokens/s, MFU, peak memory, and where the time goes.

    python tools/benchmark_step.py +recipe=1.5b_mimo data.global_batch_size=8 data.micro_batch_size=8
    python tools/benchmark_step.py +recipe=440m_siso kernels=reference --steps 5 --json docs/results/step.json

The step is the one that training runs, under Lightning, without saving; everything after the options is a recipe's
key=value. Each step is timed to the device's last kernel. On several GPUs of one machine:

    torchrun --nproc-per-node 2 tools/benchmark_step.py +recipe=440m_siso strategy=fsdp trainer.devices=2 …
"""

import argparse
import datetime
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import lightning
import torch
import triton
from hydra.utils import instantiate
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset

from mamba3_train.config import compose
from mamba3_train.model.cost import model_cost
from mamba3_train.training import processes
from mamba3_train.training.assembly import build_module, build_strategy
from mamba3_train.training.hardware import choose_precision, on_gpu, peak_flops

# Part of a step by words in the name of a GPU kernel; the first that matches counts.
PARTS = {
    "scan": ("chunk_", "state_passing", "token_scales", "head_sum", "gate_backward"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas"),
    "attention": ("flash", "fmha", "attention"),
    "optimizer": ("multi_tensor", "adam", "foreach"),
    "loss": ("softmax", "SoftMax", "nll_loss", "cross_entropy"),
    "norms": ("rms_norm", "layer_norm", "RMSNorm", "LayerNorm"),
    "copies": ("Memcpy", "Memset", "copy_kernel", "CatArray"),
}


class RandomSteps(Dataset):
    """Batches of random tokens, each all that a step needs."""

    def __init__(self, steps: int, rows: int, seqlen: int, vocab_size: int):
        self.shape, self.steps, self.vocab_size = (rows, seqlen + 1), steps, vocab_size
        self.first_seed = processes.rank() * steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.first_seed + index)
        tokens = torch.randint(0, self.vocab_size, self.shape, generator=generator)
        ids = torch.zeros(self.shape[0], self.shape[1] - 1, dtype=torch.int32)
        return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "document_ids": ids}


class StepTimer(lightning.Callback):
    """Seconds of every step, and a profile of the last."""

    def __init__(self, steps: int):
        self.steps, self.seconds, self.profile = steps, [], None
        self.started = time.perf_counter()

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == self.steps - 1:
            self.profile = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
            self.profile.start()
        _wait()
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        _wait()
        self.seconds.append(time.perf_counter() - self.began)
        if batch_idx == 0:
            self.first_step_after = time.perf_counter() - self.started
        if self.profile is not None:
            self.profile.stop()


def share_by_part(step_profile, step_seconds: float) -> dict[str, float]:
    """Milliseconds of GPU time by part of the step, and the time in which no kernel ran."""
    parts = dict.fromkeys([*PARTS, "elementwise and rest"], 0.0)
    for event in step_profile.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            part = next((p for p, words in PARTS.items() if any(w in event.key for w in words)), "elementwise and rest")
            parts[part] += event.self_device_time_total / 1e3
    return parts | {"gaps": max(step_seconds * 1e3 - sum(parts.values()), 0.0)}


def main() -> None:
    """Run and print a table; with --json also write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--kernels", type=int, default=0, help="print this many of the GPU kernels that take longest")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    arguments, overrides = parser.parse_known_args()
    steps = arguments.warmup + arguments.steps + 1  # the last one is profiled, not timed
    config = compose(*overrides, f"trainer.max_steps={steps}")
    model_config = instantiate(config.model)
    seqlen, rows = config.data.sequence_length, config.data.global_batch_size
    world_size = config.trainer.devices * config.trainer.num_nodes
    processes.join(on_gpu(config.trainer.accelerator))
    timer = StepTimer(steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            strategy=build_strategy(config),
            accelerator=config.trainer.accelerator,
            devices=config.trainer.devices,
            num_nodes=config.trainer.num_nodes,
            precision=choose_precision(config.trainer.precision, config.trainer.accelerator),
            max_steps=steps,
            callbacks=[timer],
            default_root_dir=folder,
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = RandomSteps(steps, rows // world_size, seqlen, model_config.vocab_size)
        trainer.fit(build_module(config, model_config), DataLoader(data, batch_size=None))
    if processes.rank():
        return
    result = summarise(config, overrides, timer, arguments, rows * seqlen, model_cost(model_config, seqlen))
    print(json.dumps(result, indent=1))
    if arguments.kernels:
        print(timer.profile.key_averages().table(sort_by="self_device_time_total", row_limit=arguments.kernels))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def summarise(config, overrides, timer: StepTimer, arguments, tokens: int, cost) -> dict:
    """The figures of one run, with all that is needed to repeat it."""
    seconds = statistics.median(timer.seconds[arguments.warmup : -1])
    on_gpu = torch.cuda.is_available() and config.trainer.accelerator != "cpu"
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    peak = peak_flops(device)
    devices = config.trainer.devices * config.trainer.num_nodes
    flops = cost.training_flops_per_token * tokens
    return {
        "command": " ".join(["python tools/benchmark_step.py", *overrides]),
        "recipe": config.run.name,
        "parameters": cost.total_parameters,
        "tokens_per_step": tokens,
        "step_ms": seconds * 1e3,
        "step_ms_all": [round(s * 1e3, 2) for s in timer.seconds],
        "tokens_per_second": tokens / seconds,
        "devices": devices,
        "tflops_per_device": flops / seconds / devices / 1e12,
        "mfu": None if peak is None else flops / seconds / devices / peak,
        "first_step_after_seconds": timer.first_step_after,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "ms_by_part": share_by_part(timer.profile, timer.seconds[-1]) if on_gpu else None,
        "device": device,
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "lightning": lightning.__version__},
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _commit() -> str | None:
    """The checked-out commit, marked when files differ from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


if __name__ == "__main__":
    main()
