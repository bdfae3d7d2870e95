"""The story of a run: data → run folder → model → callbacks → Trainer.fit → report."""

import logging
import warnings
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from mamba3_train.config import command
from mamba3_train.errors import UserError


@command("train")
def cli(config: DictConfig) -> int:
    """Train what the config describes; returns the exit code."""
    # Heavy imports wait until there is something to do: --help and mistakes in the config answer at once.
    from hydra.utils import instantiate
    from rich.console import Console

    from mamba3_train.checkpoint import folders
    from mamba3_train.checkpoint.resume import open_run_folder
    from mamba3_train.model.cost import model_cost
    from mamba3_train.training import processes
    from mamba3_train.training.callbacks import Preempted, Profiling
    from mamba3_train.training.hardware import choose_precision, on_gpu
    from mamba3_train.training.metrics_file import MetricsFile
    from mamba3_train.training.report import report

    _quiet()
    console = Console(highlight=False, quiet=processes.rank() != 0)
    folder, max_steps = Path(config.run.dir), config.trainer.max_steps
    # Everything that can be refused is built first: a mistake must leave no trace in the run folder.
    model_config = instantiate(config.model)
    data = instantiate(config.data)
    module = build_module(config, model_config)
    strategy = build_strategy(config)
    precision = choose_precision(config.trainer.precision, config.trainer.accelerator)
    checkpointing = build_checkpointing(config, data)
    logger = build_logger(config)
    profiling = [] if config.profile is None else [Profiling(folder, list(config.profile))]
    data.check_batch_size(config.trainer.devices * config.trainer.num_nodes)

    processes.start_processes(config.trainer.devices, config.trainer.num_nodes)
    processes.join(on_gpu(config.trainer.accelerator), config.trainer.watchdog_seconds)
    processes.decided_by_rank_zero(data.prepare_data)
    data.setup()
    checkpoint = processes.decided_by_rank_zero(lambda: open_run_folder(config))
    step = folders.read_state(checkpoint)["step"] if checkpoint else 0
    if step >= max_steps:
        console.print(f"{folder} is complete at step {step}: see {folder}/summary.json, or raise trainer.max_steps")
        return 0
    console.print(f"resuming {folder} at step {step}" if checkpoint else f"starting {folder}")
    data.samples_consumed, data.total_steps = step * data.global_batch_size, max_steps
    checkpointing.resume_from = checkpoint
    cost = model_cost(model_config, data.sequence_length)
    console.print(
        f"{cost.total_parameters:,} parameters, {cost.training_flops_per_token / 1e6:,.1f} MFLOP a token, "
        f"{data.tokens_per_step:,} tokens a step"
    )

    loggers = [MetricsFile(folder / "metrics.jsonl", from_step=step), *([logger] if logger else [])]
    trainer = build_trainer(config, strategy, precision, data, cost, checkpointing, profiling, loggers, console)
    try:
        trainer.fit(module, datamodule=data)
    except Preempted as stop:
        console.print(f"{stop}; the same command goes on from there")
        return stop.exit_code
    problems = [checkpointing.failure] if checkpointing.failure else []
    try:
        report(config.report, folder, trainer, module, data, cost, console)
    except OSError as error:
        problems.append(f"the report could not be written: {error}")
    if problems:
        raise UserError("; ".join(problems) + ". Mend the storage and give the same command again")
    return 0


def build_module(config: DictConfig, model_config):
    """The Lightning module; its parameters are made when training starts."""
    from hydra.utils import instantiate

    from mamba3_train.training.lightning_module import PretrainingModule

    return PretrainingModule(
        model_config,
        kernels=config.kernels.backend,
        optimizer=instantiate(config.optimizer),
        schedule=instantiate(config.schedule),
        seed=config.run.seed,
        micro_batch_size=config.data.micro_batch_size,
        gradient_clip_norm=config.trainer.gradient_clip_norm,
        activation_checkpointing=config.trainer.activation_checkpointing,
        segment_length=config.data.get("segment_length"),
        compile=config.trainer.compile,
    )


def build_strategy(config: DictConfig):
    """The Lightning strategy for the devices asked for."""
    from hydra.utils import instantiate

    devices = {key: config.trainer[key] for key in ("accelerator", "devices", "num_nodes")}
    return instantiate(config.strategy, **devices)


def build_checkpointing(config: DictConfig, data):
    """The callback that saves, and goes on from its `resume_from` if that is set."""
    from mamba3_train.training.callbacks import Checkpointing

    return Checkpointing(
        Path(config.run.dir) / "checkpoints",
        every_n_steps=config.checkpoint.every_n_steps,
        keep_last=config.checkpoint.keep_last,
        keep_every_n_steps=config.checkpoint.keep_every_n_steps,
        asynchronous=config.checkpoint.asynchronous,
        samples_per_step=data.global_batch_size,
        config_yaml=OmegaConf.to_yaml(config, resolve=True),
    )


def build_logger(config: DictConfig):
    """The logger besides metrics.jsonl, if one is chosen; it opens nothing before the first row."""
    from hydra.utils import instantiate

    if not config.logger:
        return None
    settings = OmegaConf.to_container(config, resolve=True)
    # Not recursively: the settings name targets, too.
    return instantiate(config.logger, folder=config.run.dir, settings=settings, _convert_="all", _recursive_=False)


def build_trainer(config: DictConfig, strategy, precision, data, cost, checkpointing, profiling, loggers, console):
    """Lightning's Trainer with our callbacks and loggers; it does the loop and nothing of saving or showing."""
    import lightning

    from mamba3_train.training import callbacks

    folder, every_n_steps = Path(config.run.dir), config.trainer.log_every_n_steps
    norms = callbacks.Norms(every_n_steps=every_n_steps, of_layers=config.trainer.log_layer_norms)
    throughput = callbacks.Throughput(
        every_n_steps=every_n_steps,
        tokens_per_step=data.tokens_per_step,
        flops_per_token=cost.training_flops_per_token,
        norms=norms,
    )
    progress, preemption = callbacks.Progress(throughput, console), callbacks.Preemption(checkpointing)
    hang_detection = callbacks.HangDetection(config.trainer.watchdog_seconds, folder)
    checkpointing.before_waiting = hang_detection.on_save_waited_for
    return lightning.Trainer(
        strategy=strategy,
        accelerator=config.trainer.accelerator,
        devices=config.trainer.devices,
        num_nodes=config.trainer.num_nodes,
        precision=precision,
        max_steps=config.trainer.max_steps,
        val_check_interval=config.validation.every_n_steps or None,
        check_val_every_n_epoch=None,
        log_every_n_steps=every_n_steps,
        callbacks=[throughput, norms, checkpointing, progress, preemption, *profiling, hang_detection],
        logger=loggers,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def _quiet() -> None:
    """Silence what libraries say about choices that are ours."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", module="torch.distributed.checkpoint")
