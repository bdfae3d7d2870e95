"""Short trainings under every strategy, one after another in one group of processes.

Run by `test_strategies.py` on the CPU; on two GPUs:

    python tests/training/strategy_runs.py FOLDER --corpus CORPUS --accelerator gpu
"""

import argparse
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

from mamba3_train.training import process_end

STRATEGIES = ("ddp", "fsdp", "hsdp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3")
PRECISIONS = ("32-true", "bf16-mixed")
# Plain parameters, and both kinds of shards: under the others weights are put in place by the same code.
STARTED = ("single", "ddp", "fsdp", "deepspeed_zero3")
STEPS, HALF = 20, 10
SMALL = [
    "+recipe=quickstart", "data.prepare.automatic=false", "data.validation_sequences=4", "data.sequence_length=32",
    "data.num_workers=0", "model.d_model=32", "model.d_mlp=32", "model.n_layers=3", "model.layer_pattern=MM*",
    "model.mixer.head_dim=16", "model.mixer.d_state=16", "model.attention.n_heads=2", "model.attention.n_kv_heads=1",
    "model.attention.head_dim=16", f"trainer.max_steps={STEPS}", f"schedule.total_steps={STEPS}",
    "trainer.log_every_n_steps=1", "validation.every_n_steps=0", f"checkpoint.every_n_steps={HALF}",
    "report.sample_prompt=null",
]  # fmt: skip
ALONE = ["strategy=single", "trainer.devices=1"]


def overrides(strategy: str) -> list[str]:
    """What to add to SMALL for a strategy on two devices."""
    if strategy == "single":
        return ALONE
    if strategy == "accumulation":
        return [*ALONE, "data.micro_batch_size=2"]
    if strategy == "fsdp_offload":
        return [*overrides("fsdp"), "strategy.cpu_offload=true"]
    own = ["strategy.replicas=2", "strategy.layers_together=2"] if strategy == "hsdp" else []
    return [f"strategy={strategy}", "trainer.devices=2", "data.micro_batch_size=2", *own]


def main() -> None:
    """Start the processes, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where run folders go")
    parser.add_argument("--corpus", required=True, help="a prepared corpus of vocabulary 4,096")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--all-pairs", action="store_true", help="go on from every strategy under every other")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        # Moving to host memory shows itself only where there is another.
        work(arguments, STRATEGIES if arguments.accelerator == "cpu" else (*STRATEGIES, "fsdp_offload"))
        return
    command = [sys.executable, *sys.argv]
    # The one that is alone goes first: the others go on from its checkpoints.
    work(arguments, ("single", "accumulation"))
    start_two(command)
    if arguments.all_pairs:
        for precision, source in itertools.product(PRECISIONS, STRATEGIES):
            change(arguments, source, "single", precision)


def start_two(command: list[str]) -> None:
    """Run a command as two processes that find each other; ends here if one of them fails."""
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [subprocess.Popen(command, env=environment | {"RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]
    codes = [process.wait() for process in processes]
    if any(codes):
        sys.exit(max(codes, key=abs))


def free_port() -> str:
    """A port of this machine that nobody listens on."""
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def work(arguments: argparse.Namespace, strategies: tuple[str, ...]) -> None:
    """Train under every strategy from the start, then under every one from another's checkpoint of half-way."""
    # DeepSpeed remembers autocast for the life of the process, so float32 comes first.
    for precision in PRECISIONS:
        for strategy in strategies:
            train(arguments, arguments.folder / precision / strategy, strategy, precision)
            if precision == "32-true" and strategy in STARTED:
                begin = [f"init_from={arguments.folder / precision / 'single'}", "trainer.max_steps=1"]
                train(arguments, arguments.folder / "started" / strategy, strategy, precision, *begin)
        if "single" in strategies or (precision != "32-true" and not arguments.all_pairs):
            continue
        before = ("single", *strategies)
        pairs = itertools.product(before, strategies) if arguments.all_pairs else itertools.pairwise(before)
        for source, strategy in pairs:
            if source != strategy:
                change(arguments, source, strategy, precision)


def change(arguments: argparse.Namespace, source: str, strategy: str, precision: str) -> None:
    """Train the second half under another strategy than the first."""
    folder = arguments.folder / precision / f"{source}-then-{strategy}"
    go_on_from(arguments.folder / precision / source, folder)
    train(arguments, folder, strategy, precision)


def train(arguments: argparse.Namespace, folder: Path, strategy: str, precision: str, *more: str) -> None:
    """One run of the command, in this process."""
    from mamba3_train.train import cli
    from mamba3_train.training import report
    from mamba3_train.training.lightning_module import PretrainingModule

    report.plot_loss = lambda *_, **__: None
    PretrainingModule.on_train_end = lambda module: write_audit(folder, module)
    if not hasattr(PretrainingModule.training_step, "__wrapped__"):
        PretrainingModule.training_step = without_barriers(PretrainingModule.training_step)
    settings = [f"run.dir={folder}", f"data.path={arguments.corpus}", f"trainer.precision={precision}"]
    accelerator = [f"trainer.accelerator={arguments.accelerator}"]
    sys.argv = ["mamba3_train", *SMALL, *overrides(strategy), *settings, *accelerator, *more]
    try:
        cli()
    except SystemExit as end:
        if end.code:
            raise


def without_barriers(step):
    """A training step in which a barrier is an error: at one the host waits for the device."""

    def refuse(*_, **__):
        raise AssertionError("a training step came to a barrier")

    @functools.wraps(step)
    def watched(*arguments):
        with mock.patch("torch.distributed.barrier", refuse):
            return step(*arguments)

    return watched


def write_audit(folder: Path, module) -> None:
    """audit.json: of every parameter what `precision_audit.audit` finds, by its name without the layer's number."""
    from precision_audit import audit

    found = audit(module.trainer.strategy, module.model, module.optimizers().optimizer)
    if module.trainer.is_global_zero:
        (folder / "audit.json").write_text(json.dumps(found, indent=1))


def go_on_from(source: Path, folder: Path) -> None:
    """A run folder as it was half-way through another run."""
    if int(os.environ.get("RANK", "0")):
        # The first thing that a run does is wait for rank 0.
        return
    name = f"step-{HALF:08d}"
    shutil.copytree(source / "checkpoints" / name, folder / "checkpoints" / name)
    shutil.copy(source / "config.yaml", folder / "config.yaml")
    rows = [json.loads(line) for line in (source / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows if r["step"] <= HALF))


if __name__ == "__main__":
    with process_end.at_once():
        main()
