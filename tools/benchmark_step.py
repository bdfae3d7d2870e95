"""Time a recipe's full training step on random tokens: tokens/s, MFU, peak memory, time by part.

    python tools/benchmark_step.py +recipe=1.5b_mimo data.global_batch_size=8 data.micro_batch_size=8
    python tools/benchmark_step.py +recipe=440m_siso kernels=reference --steps 5 --json docs/results/step.json

The step is the one that training runs, under Lightning, without saving; everything after the options is a recipe's
key=value. A step's time is that between its last kernel and the last one of the step before, on the device, which is
not waited for: the host runs ahead as in training. On several GPUs of one machine:

    torchrun --nproc-per-node 2 tools/benchmark_step.py +recipe=440m_siso strategy=fsdp trainer.devices=2 …
"""

import argparse
import datetime
import itertools
import json
import statistics
import subprocess
import time
from pathlib import Path

import lightning
import torch
import triton
from hydra.utils import instantiate
from step_parts import milliseconds_by_part, recorded
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset

from mamba3_train.config import compose
from mamba3_train.model.cost import model_cost
from mamba3_train.training import process_end, processes
from mamba3_train.training.assembly import build_module, build_strategy, build_trainer
from mamba3_train.training.device_clock import DeviceClock
from mamba3_train.training.hardware import choose_precision, on_gpu, peak_flops


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
    """Seconds of every step but the first and those of which it takes a profile, the last `profiled`."""

    def __init__(self, steps: int, profiled: int):
        self.first_profiled, self.last = steps - profiled, steps - 1
        self.ends, self.seconds, self.profile = [], [], None
        self.started = time.perf_counter()

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == self.first_profiled:
            _wait()
            self.seconds = [self.clock.seconds([span]) for span in itertools.pairwise(self.ends)]
            self.profile = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
            self.profile.start()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 0:
            _wait()
            self.first_step_after = time.perf_counter() - self.started
            self.clock = DeviceClock(module.device)
        self.ends.append(self.clock.now())
        if batch_idx == self.last:
            _wait()
            self.profile.stop()


def main() -> None:
    """Run and print a table; with --json also write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    arguments, overrides = parser.parse_known_args()
    steps = arguments.warmup + arguments.steps + 1  # the last one is profiled, not timed
    config = compose(*overrides)
    timer = run_steps(config, steps, profiled=1)
    if processes.rank():
        return
    result = summarise(config, overrides, timer, arguments)
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def run_steps(config, steps: int, profiled: int) -> StepTimer:
    """Train that many steps of a recipe on random tokens, profiling the last ones."""
    processes.join(on_gpu(config.trainer.accelerator))
    timer = StepTimer(steps, profiled)
    model_config = instantiate(config.model)
    config.trainer.max_steps, config.validation.every_n_steps = steps, 0
    precision = choose_precision(config.trainer.precision, config.trainer.accelerator)
    trainer = build_trainer(config, build_strategy(config), precision, [timer], loggers=[])
    rows = config.data.global_batch_size // (config.trainer.devices * config.trainer.num_nodes)
    data = RandomSteps(steps, rows, config.data.sequence_length, model_config.vocab_size)
    loader = DataLoader(data, batch_size=None, pin_memory=torch.cuda.is_available())
    trainer.fit(build_module(config, model_config), loader)
    return timer


def summarise(config, overrides, timer: StepTimer, arguments) -> dict:
    """The figures of one run, with all that is needed to repeat it."""
    tokens = config.data.global_batch_size * config.data.sequence_length
    cost = model_cost(instantiate(config.model), config.data.sequence_length)
    seconds = statistics.median(timer.seconds[-arguments.steps :])
    has_gpu = torch.cuda.is_available() and config.trainer.accelerator != "cpu"
    device = torch.cuda.get_device_name() if has_gpu else "cpu"
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
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if has_gpu else None,
        "ms_by_part": milliseconds_by_part(recorded(timer.profile)) if has_gpu else None,
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
    with process_end.at_once():
        main()
