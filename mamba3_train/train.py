"""The story of a run: data → run folder → model → callbacks → Trainer.fit → report."""

import logging
import signal
import warnings
from contextlib import ExitStack
from pathlib import Path

from omegaconf import DictConfig

from mamba3_train.config import MISTAKES, command
from mamba3_train.training import slurm
from mamba3_train.training.stop_signals import StopSignals, exit_code

log = logging.getLogger(__name__)


@command("train")
def cli(config: DictConfig) -> int:
    """Train what the config describes, until it is complete or asked to stop; returns the exit code."""
    slurm.adopt_ranks()
    with StopSignals() as stop, ExitStack() as leaving:
        try:
            return _train(config, stop, leaving)
        except Exception as error:
            if not stop.received or isinstance(error, MISTAKES):
                raise
            # A signal to all processes ends helpers that compile or log, and other ranks' ends are felt here.
            log.exception("failed after %s; the same command goes on", signal.Signals(stop.received).name)
            return exit_code(stop.received)


def _train(config: DictConfig, stop: StopSignals, leaving: ExitStack) -> int:
    # Heavy imports wait until there is something to do: --help and mistakes in the config answer at once.
    from hydra.utils import instantiate
    from rich.console import Console

    from mamba3_train.checkpoint.resume import leave_run_folder
    from mamba3_train.model.cost import model_cost
    from mamba3_train.training import assembly, processes
    from mamba3_train.training.callbacks import Preempted, Profiling
    from mamba3_train.training.hardware import choose_precision, on_gpu
    from mamba3_train.training.metrics_file import MetricsFile, validation_missing
    from mamba3_train.training.report import check_accuracy_lengths, is_reported, report

    _quiet()
    console = Console(highlight=False, quiet=processes.rank() != 0)
    folder, max_steps = Path(config.run.dir), config.trainer.max_steps
    # Everything that can be refused is built first: a mistake must leave no trace in the run folder.
    assembly.check_numbers(config)
    model_config = instantiate(config.model)
    data = instantiate(config.data)
    start = assembly.open_start(config, model_config)
    module = assembly.build_module(config, model_config, start)
    strategy = assembly.build_strategy(config)
    precision = choose_precision(config.trainer.precision, config.trainer.accelerator)
    checkpointing = assembly.build_checkpointing(config, data)
    logger = assembly.build_logger(config)
    evaluation = assembly.build_evaluation(config)
    profiling = [] if config.profile is None else [Profiling(folder, list(config.profile))]
    data.check_batch_size(config.trainer.devices * config.trainer.num_nodes)
    check_accuracy_lengths(config.report.accuracy_lengths, data)

    preemption = assembly.build_preemption(config, checkpointing, stop)
    processes.start_processes(config.trainer.devices, config.trainer.num_nodes, stop)
    processes.join(on_gpu(config.trainer.accelerator), config.trainer.watchdog_seconds)
    leaving.callback(leave_run_folder)
    checkpoint, step, samples = _make_ready(config, data, start)
    if step >= max_steps and is_reported(folder, step):
        console.print(f"{folder} is complete at step {step}: see {folder}/summary.json, or raise trainer.max_steps")
        return 0
    begin = f"starting {folder}" + (f" from {start.description}" if start else "")
    console.print(f"resuming {folder} at step {step}" if checkpoint else begin, soft_wrap=True)
    # Every roll back takes steps again, with other data.
    most_steps = max_steps - step + config.guards.max_rollbacks * max_steps
    data.samples_consumed, data.total_steps = samples, samples // data.global_batch_size + most_steps
    checkpointing.resume_from = checkpoint
    metrics, interval = folder / "metrics.jsonl", config.validation.every_n_steps
    preemption.validate_first = processes.decided_by_rank_zero(lambda: validation_missing(metrics, step, interval))
    cost = model_cost(model_config, data.sequence_length)
    console.print(
        f"{cost.total_parameters:,} parameters, {cost.training_flops_per_token / 1e6:,.1f} MFLOP a token, "
        f"{data.tokens_per_step:,} tokens a step"
    )

    if interval and not data.has_validation:
        console.print(f"nothing is validated: there are no rows for it (validation.every_n_steps={interval})")

    loggers = [MetricsFile(metrics, from_step=step), *([logger] if logger else [])]
    watching = assembly.build_callbacks(config, data, cost, checkpointing, preemption, profiling, evaluation, console)
    trainer = assembly.build_trainer(config, strategy, precision, watching, loggers)
    try:
        trainer.fit(module, datamodule=data)
    except Preempted as end:
        console.print(f"{end}; the same command goes on from there")
        return end.exit_code
    report(config.report, folder, trainer, module, data, cost, console, checkpointing.failure)
    return 0


def _make_ready(config: DictConfig, data, start) -> tuple[Path | None, int, int]:
    """Prepare the data, check the weights to start from, open the run folder.

    Returns:
        the checkpoint to go on from, if there is one, and the steps and samples that it stands for.
    """
    from mamba3_train.checkpoint import folders
    from mamba3_train.checkpoint.resume import open_run_folder
    from mamba3_train.training import processes

    processes.decided_by_rank_zero(data.prepare_data)
    data.setup()
    if start is not None:
        data.check_tokenizer(start.folder)
        processes.decided_by_rank_zero(start.verify)
    checkpoint = processes.decided_by_rank_zero(lambda: open_run_folder(config, data.documents(), data.fingerprint))
    state = folders.read_state(checkpoint) if checkpoint else {"step": 0, "samples": 0}
    return checkpoint, state["step"], state["samples"]


def _quiet() -> None:
    """Silence what libraries say about choices that are ours."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", module="torch.distributed.checkpoint")
