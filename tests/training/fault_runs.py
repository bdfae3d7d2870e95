"""Trainings in which something goes wrong at chosen batches of the data, under every strategy in one pair of processes.

Run by `test_guards.py`, which also takes `train` from here for what one process shows.
"""

import argparse
import json
import math
import os
import shutil
import signal
import sys
from collections import defaultdict
from pathlib import Path

import torch
from strategy_runs import SMALL, STRATEGIES, overrides

from mamba3_train.training import process_end

FAULTY = [
    *SMALL, "model.layer_pattern=M", "model.n_layers=1", "trainer.max_steps=9", "schedule.total_steps=9",
    "checkpoint.every_n_steps=1", "checkpoint.keep_last=9", "checkpoint.asynchronous=false", "guards.spike_window=4",
    "data.validation_sequences=0", "trainer.precision=32-true", "trainer.accelerator=cpu",
]  # fmt: skip
# Batch of the data, counted from 0 → what happens to its loss, and on which rank (None: on all).
ISOLATED = {1: ("nan", 1), 2: ("inf gradient", 0), 4: ("spike", None)}
REPEATED = {6: ("spike", None), 7: ("spike", None)}
ROLL_BACK = ["guards.max_spikes_in_a_row=2", "guards.max_rollbacks=1"]


class ScaledGradient(torch.autograd.Function):
    """Leaves a value as it is and multiplies its gradient."""

    @staticmethod
    def forward(context, value, factor):
        context.factor = factor
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * context.factor, None


HARM = {
    "nan": lambda loss: loss * math.nan,
    "inf gradient": lambda loss: ScaledGradient.apply(loss, math.inf),
    "spike": lambda loss: loss * 10,
}


def inject(module_class, faults: dict, history: list, at_batch=lambda batch: None) -> None:
    """Make a module class suffer faults; `history` gets (step, batch, whether the step changed anything) of each step.

    Args:
        at_batch: called with the number of each batch before it is learned from.
    """
    taken = defaultdict(int)

    def training_step(module, batch, batch_idx):
        data = module.trainer.datamodule
        module.batch_number = data.samples_consumed // data.global_batch_size + taken[id(module)]
        taken[id(module)] += 1
        at_batch(module.batch_number)
        before = [tensor.clone() for tensor in state(module)]
        outputs = original_step(module, batch, batch_idx)
        after = state(module)
        same = len(before) == len(after) and all(map(torch.equal, before, after))
        history.append((module.global_step, module.batch_number, not same))
        return outputs

    def loss_sum(module, segment, carried):
        loss, carried = original_loss(module, segment, carried)
        kind, rank = faults.get(module.batch_number, (None, None))
        harmed = kind and (module.trainer.world_size == 1 or rank in (None, module.trainer.global_rank))
        return (HARM[kind](loss) if harmed else loss), carried

    original_step, original_loss = module_class.training_step, module_class._loss_sum
    module_class.training_step, module_class._loss_sum = training_step, loss_sum


def state(module) -> list[torch.Tensor]:
    """This rank's part of all that an optimizer's step may change."""
    optimizer = getattr(module.trainer.strategy, "inner_optimizer", None) or module.optimizers().optimizer
    tensors = [getattr(parameter, "ds_tensor", parameter) for parameter in module.model.parameters()]
    for parameter, values in optimizer.state.items():
        tensors += [parameter, *values.values()]
    return [(t.to_local() if hasattr(t, "to_local") else t).detach() for t in tensors]


def train(folder: Path, corpus: Path, *settings: str, faults=None, at_batch=lambda batch: None):
    """One run of the command in this process with faults; returns its exit code and the history of its steps."""
    from mamba3_train.train import cli
    from mamba3_train.training import report
    from mamba3_train.training.lightning_module import PretrainingModule

    report._report = lambda *_: None  # what is shown at the end is tested elsewhere
    history = []
    originals = PretrainingModule.training_step, PretrainingModule._loss_sum
    inject(PretrainingModule, faults or {}, history, at_batch)
    before, sys.argv = sys.argv, ["mamba3_train", *FAULTY, f"run.dir={folder}", f"data.path={corpus}", *settings]
    try:
        cli()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = before
        PretrainingModule.training_step, PretrainingModule._loss_sum = originals
    return code, history


def main() -> None:
    """Be one of two processes: every strategy with faults, a slow rank, and at last one that stops."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where run folders go")
    parser.add_argument("--corpus", required=True, type=Path)
    arguments = parser.parse_args()
    rank = int(os.environ["RANK"])
    for strategy in STRATEGIES:
        folder = arguments.folder / strategy
        outcome = train(folder, arguments.corpus, *overrides(strategy), *ROLL_BACK, faults=ISOLATED | REPEATED)
        (folder / f"outcome-{rank}.json").write_text(json.dumps(outcome))
    go_on_from(arguments.folder / "single", arguments.folder / "resumed")
    outcome = train(arguments.folder / "resumed", arguments.corpus, *overrides("ddp"), *ROLL_BACK)
    (arguments.folder / "resumed" / f"outcome-{rank}.json").write_text(json.dumps(outcome))
    slow_rank(arguments, rank)

    def stop_one(batch):
        if batch == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)

    watchdog = "trainer.watchdog_seconds=5"
    train(arguments.folder / "stopped", arguments.corpus, *overrides("ddp"), watchdog, at_batch=stop_one)


def go_on_from(source: Path, folder: Path) -> None:
    """A run folder as it was before the last checkpoint of another."""
    if int(os.environ["RANK"]) == 0:
        shutil.copytree(source, folder)
        shutil.rmtree(max((folder / "checkpoints").iterdir()))


def slow_rank(arguments: argparse.Namespace, rank: int) -> None:
    """A run whose rank 1 takes three times as long; writes what its clock was asked for, and what of it waited."""
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    from mamba3_train.training.callbacks import stragglers

    events = []

    class Clock:
        def __init__(self, device):
            pass

        def now(self):
            events.append("moment")
            return len(events)

        def seconds(self, spans):
            return 3.0 if rank == 1 else 1.0

    original_clock, original_wait = stragglers.DeviceClock, FSDPParamGroup.wait_for_unshard
    stragglers.DeviceClock = Clock
    FSDPParamGroup.wait_for_unshard = lambda group: (events.append("parameters"), original_wait(group))
    folder = arguments.folder / "slow"
    train(folder, arguments.corpus, *overrides("fsdp"), "trainer.max_steps=4", "trainer.log_every_n_steps=1")
    stragglers.DeviceClock, FSDPParamGroup.wait_for_unshard = original_clock, original_wait
    (folder / f"events-{rank}.json").write_text(json.dumps(events))


if __name__ == "__main__":
    with process_end.at_once():
        main()
