"""Runs that are asked to stop in every phase, by every signal, to either rank or both, and then go on.

Run by `test_preemption.py`: one pair of processes for all of them. A signal is sent from inside the phase that it is to
arrive in, and the phase waits until it has.
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from strategy_runs import start_two

from mamba3_train.training import process_end

STEPS, VALIDATE_EVERY, SAVE_EVERY = 8, 4, 3
SMALL = [
    "+recipe=quickstart", "data.prepare.automatic=false", "data.validation_sequences=8", "data.sequence_length=16",
    "data.num_workers=0", "model.d_model=16", "model.d_mlp=16", "model.n_layers=1", "model.mixer.head_dim=16",
    "model.mixer.d_state=8", f"trainer.max_steps={STEPS}", "trainer.log_every_n_steps=1", "trainer.devices=2",
    f"validation.every_n_steps={VALIDATE_EVERY}", f"checkpoint.every_n_steps={SAVE_EVERY}", "report.sample_prompt=null",
    "data.micro_batch_size=1",
]  # fmt: skip
# Phase → the step that is over when the run leaves.
PHASES = {
    "first step": 1, "step": 5, "accumulation": 5, "validation": 4, "saving": 4, "last step": 8, "time limit": 5,
}  # fmt: skip
SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2")
TARGETS = {"rank 0": (0,), "rank 1": (1,), "all ranks": (0, 1)}
# Every phase with every target, the ends with one; over three phases, or three targets, every signal.
MATRIX = [
    (phase, SIGNALS[(i + j) % 3], target, "fsdp" if phase == "validation" else "ddp")
    for i, phase in enumerate(PHASES)
    for j, target in enumerate(TARGETS)
    if phase not in ("step", "last step", "time limit")
]
MATRIX += [
    ("step", "SIGINT", "all ranks", "ddp"),
    ("last step", "SIGUSR1", "rank 1", "ddp"),
    ("time limit", "SIGTERM", "rank 0", "ddp"),
]


def name_of(phase: str, number: str, target: str, strategy: str) -> str:
    """Of a run and its folder."""
    return f"{phase} {number} {target} {strategy}".replace(" ", "-")


class Sender:
    """Sends the signal of a scenario, once, when its phase calls `arrive`."""

    def __init__(self, phase: str, number: str, target: str):
        self.phase, self.number = phase, signal.Signals[number]
        self.here = int(os.environ["RANK"]) in TARGETS[target]
        self.sent, self.next_step = False, threading.Event()

    def arrive(self, phase: str) -> None:
        """Signal this process if it is this phase's turn, twice, as launchers do; return when that was noticed."""
        from mamba3_train.training.stop_signals import _active

        if phase != self.phase or self.sent or not self.here:
            return
        self.sent = True
        for _ in range(2):
            os.kill(os.getpid(), self.number)
        while not _active[-1].received:
            time.sleep(0.001)


def instrument() -> dict[str, Sender | None]:
    """Put calls of `arrive` into the phases; the returned dictionary's `sender` is the one that is called."""
    from mamba3_train.checkpoint import saver
    from mamba3_train.training import report
    from mamba3_train.training.callbacks import Preemption
    from mamba3_train.training.lightning_module import PretrainingModule as Module

    now: dict[str, Sender | None] = {"sender": None}
    originals = Module.training_step, Module._loss_sum, Module.validation_step, saver.write_shard
    training_step, loss_sum, validation_step, write_shard = originals
    report.plot_loss = lambda *_, **__: None
    passes = [0]

    def arrive(phase: str) -> None:
        if now["sender"] is not None:
            now["sender"].arrive(phase)

    def step(module, batch, index):
        number, passes[0] = module.global_step + 1, 0
        phases = {1: "first step", 4: "saving: next step", 5: "step", STEPS: "last step"}
        arrive(phases.get(number, ""))
        sender = now["sender"]
        if sender is not None and sender.phase == "saving" and number == SAVE_EVERY + 1:
            sender.next_step.set()
            while sender.here and not sender.sent:
                time.sleep(0.001)
        if sender is not None and sender.phase == "time limit" and number == 5 and sender.here:
            next(c for c in module.trainer.callbacks if isinstance(c, Preemption)).stop_at = time.time()
        return training_step(module, batch, index)

    def micro_batch(module, *arguments):
        passes[0] += 1
        if module.global_step + 1 == 5 and passes[0] == 2:
            arrive("accumulation")
        return loss_sum(module, *arguments)

    def validate(module, batch, index):
        if module.global_step == VALIDATE_EVERY and index == 1:
            arrive("validation")
        return validation_step(module, batch, index)

    def write(*arguments):
        # Before that step the run might still leave at the one that is being saved.
        if now["sender"] is not None and now["sender"].phase == "saving":
            now["sender"].next_step.wait(60)
        arrive("saving")
        return write_shard(*arguments)

    Module.training_step, Module._loss_sum, Module.validation_step = step, micro_batch, validate
    saver.write_shard = write
    return now


def train(arguments: argparse.Namespace, name: str, strategy: str) -> int:
    """One run of the command in this process; returns its exit code."""
    from mamba3_train.train import cli

    paths = [f"run.dir={arguments.folder / name}", f"data.path={arguments.corpus}"]
    sys.argv = ["mamba3_train", *SMALL, f"strategy={strategy}", *paths]
    try:
        cli()
    except SystemExit as end:
        return end.code or 0
    return 0


def main() -> None:
    """Start the processes, or be one of them. outcomes-RANK.json gets of every run the exit codes of its two parts, and
    the step that is saved between them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--corpus", required=True)
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        start_two([sys.executable, *sys.argv])
        return
    now = instrument()
    outcomes = {strategy: [train(arguments, strategy, strategy)] for strategy in ("ddp", "fsdp")}
    for scenario in MATRIX:
        name, (phase, number, target, strategy) = name_of(*scenario), scenario
        now["sender"] = Sender(phase, number, target)
        code = train(arguments, name, strategy)
        saved = max(int(path.name[-8:]) for path in (arguments.folder / name / "checkpoints").glob("step-*"))
        now["sender"] = None
        outcomes[name] = [code, saved, train(arguments, name, strategy)]
    (arguments.folder / f"outcomes-{os.environ['RANK']}.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    with process_end.at_once():
        main()
