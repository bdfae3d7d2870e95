"""The parts of a run, made of its config: the one place where config keys meet constructors."""

import os
from pathlib import Path

import lightning
from hydra.utils import instantiate
from lightning.pytorch.plugins.environments import LightningEnvironment
from omegaconf import DictConfig, OmegaConf
from torch import nn

from mamba3_train.checkpoint import folders
from mamba3_train.checkpoint.starting_weights import StartingWeights
from mamba3_train.errors import UserError
from mamba3_train.training import callbacks, processes, slurm
from mamba3_train.training.data_cursor import DataCursor
from mamba3_train.training.hardware import choose_compile, on_gpu
from mamba3_train.training.lightning_module import PretrainingModule
from mamba3_train.training.step_guard import StepGuard

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BYTES_A_PARAMETER = 12
"""In a checkpoint: the weight and two moments in float32."""


def check_numbers(config: DictConfig) -> None:
    """Refuse settings that would only fail, or do nothing, when training has begun.

    Raises:
        UserError: a number out of its range, or kernels that cannot run here.
    """
    for key, least in (
        *(("run.seed", 0), ("trainer.devices", 1), ("trainer.num_nodes", 1)),
        *(("trainer.log_every_n_steps", 1), ("trainer.watchdog_seconds", 0), ("validation.every_n_steps", 0)),
    ):
        if (value := OmegaConf.select(config, key)) < least:
            raise UserError(f"{key}={value} must be at least {least}")
    if config.profile and config.profile[0] > config.trainer.max_steps:
        raise UserError(f"profile={list(config.profile)} begins after trainer.max_steps={config.trainer.max_steps}")
    if config.kernels.backend == "triton" and not (on_gpu(config.trainer.accelerator) or INTERPRETED):
        raise UserError("kernels=triton needs a GPU: choose kernels=auto or kernels=reference")


def open_start(config: DictConfig, model_config) -> StartingWeights | None:
    """The weights that init_from names, checked but not read; None without it, and for a run that goes on.

    Raises:
        UserError: there is no model, or another one.
    """
    if config.init_from is None or folders.published(Path(config.run.dir) / "checkpoints"):
        return None
    return StartingWeights(config.init_from, model_config)


def build_module(config: DictConfig, model_config, start: StartingWeights | None = None):
    """The Lightning module; its parameters are made when training starts."""
    instantiate(config.optimizer)(nn.ModuleDict({"norm": nn.Linear(1, 1)}))  # what it refuses, it is to refuse now
    return PretrainingModule(
        model_config,
        kernels=config.kernels.backend,
        keep=config.kernels.keep.name,
        optimizer=instantiate(config.optimizer),
        schedule=instantiate(config.schedule),
        seed=config.run.seed,
        micro_batch_size=config.data.micro_batch_size,
        gradient_clip_norm=config.trainer.gradient_clip_norm,
        activation_checkpointing=config.trainer.activation_checkpointing,
        segment_length=config.data.get("segment_length"),
        compile=choose_compile(config.trainer.compile, config.trainer.accelerator),
        start=start,
        guard=build_guard(config),
    )


def build_guard(config: DictConfig) -> StepGuard:
    """What decides on the device which steps are skipped."""
    return StepGuard(**{key: value for key, value in config.guards.items() if key != "straggler_factor"})


def build_strategy(config: DictConfig):
    """The Lightning strategy for the devices asked for."""
    devices = {key: config.trainer[key] for key in ("accelerator", "devices", "num_nodes")}
    return instantiate(config.strategy, **devices)


def build_checkpointing(config: DictConfig, data):
    """The callback that saves, and goes on from its `resume_from` if that is set."""
    return callbacks.Checkpointing(
        Path(config.run.dir) / "checkpoints",
        every_n_steps=config.checkpoint.every_n_steps,
        keep_last=config.checkpoint.keep_last,
        keep_every_n_steps=config.checkpoint.keep_every_n_steps,
        asynchronous=config.checkpoint.asynchronous,
        cursor=DataCursor(data.global_batch_size),
        config_yaml=OmegaConf.to_yaml(config, resolve=True),
    )


def build_logger(config: DictConfig):
    """The logger besides metrics.jsonl, if one is chosen; it opens nothing before the first row."""
    if not config.logger:
        return None
    settings = OmegaConf.to_container(config, resolve=True)
    # Not recursively: the settings name targets, too.
    return instantiate(config.logger, folder=config.run.dir, settings=settings, _convert_="all", _recursive_=False)


def build_preemption(config: DictConfig, checkpointing, stop):
    """The callback that ends a run on request, or in time; of several processes the first one minds the time."""
    trainer, limits = config.trainer, []
    for key in ("max_hours", "stop_before_seconds"):
        if trainer[key] is not None and trainer[key] < 0:
            raise UserError(f"trainer.{key}={trainer[key]} must be at least 0")
    if trainer.max_hours is not None:
        limits.append(stop.started + 3600 * trainer.max_hours)
    if processes.rank() == 0 and (end := slurm.job_end()) is not None:
        limits.append(end - trainer.stop_before_seconds)
    return callbacks.Preemption(checkpointing, stop, min(limits, default=None))


def build_evaluation(config: DictConfig) -> list:
    """The callback that evaluates tasks while training, if any are asked for, with their data."""
    if not config.evaluation.tasks:
        return []
    from mamba3_train.training.callbacks.task_evaluation import TaskEvaluation  # needs the optional package lm-eval

    return [TaskEvaluation(**config.evaluation)]


def build_callbacks(config: DictConfig, data, cost, checkpointing, preemption, profiling, evaluation, console) -> list:
    """All callbacks in their order: what measures comes first, what may end the run last."""
    folder, every_n_steps = Path(config.run.dir), config.trainer.log_every_n_steps
    norms = callbacks.Norms(every_n_steps=every_n_steps, of_layers=config.trainer.log_layer_norms)
    throughput = callbacks.Throughput(
        every_n_steps=every_n_steps,
        tokens_per_step=data.tokens_per_step,
        flops_per_token=cost.training_flops_per_token,
        norms=norms,
        cursor=checkpointing.cursor,
    )
    stability = callbacks.Stability(every_n_steps=every_n_steps, throughput=throughput, checkpointing=checkpointing)
    stragglers = callbacks.Stragglers(
        every_n_steps=every_n_steps, factor=config.guards.straggler_factor, throughput=throughput
    )
    disk_space = callbacks.DiskSpace(
        every_n_steps=every_n_steps,
        bytes_expected=BYTES_A_PARAMETER * cost.total_parameters,
        checkpointing=checkpointing,
    )
    progress = callbacks.Progress(throughput, console)
    hang_detection = callbacks.HangDetection(config.trainer.watchdog_seconds, folder)
    for callback in evaluation:
        callback.throughput, callback.before_pass = throughput, hang_detection.on_evaluation_pass
    checkpointing.before_waiting = hang_detection.on_save_waited_for
    measuring = [throughput, norms, stragglers, stability, *evaluation]
    return [*measuring, checkpointing, disk_space, progress, preemption, *profiling, hang_detection]


def build_trainer(config: DictConfig, strategy, precision: str, watching: list, loggers: list) -> lightning.Trainer:
    """Lightning's Trainer with our callbacks and loggers; it does the loop and nothing of saving or showing."""
    trainer = lightning.Trainer(
        strategy=strategy,
        accelerator=config.trainer.accelerator,
        devices=config.trainer.devices,
        num_nodes=config.trainer.num_nodes,
        precision=precision,
        max_steps=config.trainer.max_steps,
        val_check_interval=config.validation.every_n_steps or None,
        check_val_every_n_epoch=None,
        log_every_n_steps=config.trainer.log_every_n_steps,
        callbacks=watching,
        logger=loggers,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        # Else Lightning looks around for one, and Slurm's would requeue the job by itself.
        plugins=None if getattr(strategy, "cluster_environment", None) else [LightningEnvironment()],
    )
    _leave_signals_to_us(trainer)
    return trainer


def _leave_signals_to_us(trainer: lightning.Trainer) -> None:
    """Keep Lightning from handling SIGTERM: it broadcasts from inside the handler, which hangs, and saves nothing.

    At each step it asks rank 0's device for what its handler noted, and waits for the answer: no host would run ahead.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
