"""What a finished run shows and leaves behind: validation loss, a sample, the loss curve, a summary."""

import json
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from omegaconf import DictConfig
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from mamba3_train.checkpoint.resume import write_whole
from mamba3_train.errors import UserError
from mamba3_train.evaluation.accuracy_by_length import plot_accuracy, scaled_accuracy
from mamba3_train.evaluation.generation import generate
from mamba3_train.evaluation.loss_curve import plot_loss
from mamba3_train.evaluation.metrics import read_metrics
from mamba3_train.evaluation.sampling import Sampling
from mamba3_train.model.cost import Cost
from mamba3_train.training.strategies import bring_back


def report(
    config: DictConfig,
    folder: Path,
    trainer: Trainer,
    module: LightningModule,
    data,
    cost: Cost,
    console: Console,
    failure: str | None,
) -> None:
    """Validate if the last step was not, then write summary.json and loss.png and say where everything is.

    Args:
        failure: why the last step is not saved, if it is not.

    Raises:
        UserError: that, or storage refuses the report; the rest of it is done all the same.
    """
    problems = [failure] if failure else []
    try:
        _report(config, folder, trainer, module, data, cost, console, failure)
    except OSError as error:
        problems.append(f"the report could not be written: {error}")
    if problems:
        raise UserError("; ".join(problems) + ". Mend the storage and give the same command again")


def _report(config, folder, trainer, module, data, cost, console, failure) -> None:
    rows = read_metrics(folder / "metrics.jsonl")
    if not any("val/loss" in row and row["step"] == trainer.global_step for row in rows):
        trainer.validate(module, datamodule=data, verbose=False)
    bring_back(trainer.strategy, module.model)
    # Every rank samples, the same: a sharded model computes on all of them or not at all.
    sample = sample_text(config, module, data.tokenizer) if config.sample_prompt else None
    accuracy = accuracy_of_task(config, module, data) if config.accuracy_lengths else None
    if not trainer.is_global_zero:
        return
    rows = read_metrics(folder / "metrics.jsonl")
    newest = {key: value for row in rows for key, value in row.items()}
    # A loss that was not finite is null.
    newest |= {key: value for row in rows for key, value in row.items() if value is not None}
    if sample is not None:
        console.print(Panel(Text(sample), title=f"the model continues {config.sample_prompt.strip()!r}"))
    plot_loss(rows, folder / "loss.png", title=f"{folder.name}: {cost.total_parameters:,} parameters")
    summary = newest | {"parameters": cost.total_parameters, "sample": sample}
    if failure:
        summary["not_saved"] = failure
    if accuracy:
        summary["scaled_accuracy"] = accuracy
        plot_accuracy({folder.name: [accuracy]}, folder / "accuracy.png", folder.name, data.longest[1])
    write_whole(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    for name, key in (("training loss", "train/loss"), ("validation loss", "val/loss")):
        if key in newest:
            console.print(f"{name:<16} {newest[key]:.4f} nats a token")
    for length, value in (accuracy or {}).items():
        console.print(f"length {length:<9} {value:.1%} accuracy, where 0 % is chance")
    for name, path in (
        ("loss curve", "loss.png"),
        ("checkpoints", "checkpoints"),
        ("metrics", "metrics.jsonl"),
        ("summary", "summary.json"),
    ):
        console.print(f"{name:<16} {folder / path}", soft_wrap=True)


def is_reported(folder: Path, step: int) -> bool:
    """Whether a run that took its last step has its summary, too: it may have been stopped in between."""
    summary = folder / "summary.json"
    return summary.exists() and json.loads(summary.read_text()).get("step") == step


def check_accuracy_lengths(lengths: list[int], data) -> None:
    """Refuse before training what could not be reported after it.

    Raises:
        UserError: the data has no task, or the task no document as short.
    """
    if lengths and not hasattr(data, "rows"):
        raise UserError("report.accuracy_lengths is for data with a task: choose data=parity or another, or leave it")
    if lengths and min(lengths) < data.rows.task.shortest:
        raise UserError(
            f"report.accuracy_lengths={list(lengths)} has a length below {data.rows.task.shortest}, the shortest "
            "document of this task: leave it out"
        )


def accuracy_of_task(config: DictConfig, module: LightningModule, data) -> dict[int, float]:
    """Accuracy at the lengths asked for, the same on every rank."""
    model, rows = module.model.eval(), data.rows
    lengths, count, answers = config.accuracy_lengths, config.accuracy_documents, rows.task.answers
    with torch.compiler.set_stance("force_eager"):
        return scaled_accuracy(model, rows.examples, lengths, count, answers, module.device)


def sample_text(config: DictConfig, module: LightningModule, tokenizer) -> str:
    """Prompt and continuation as text, the same for the same weights and seed."""
    with torch.compiler.set_stance("force_eager"):  # compiled layers would be compiled again for every new length
        generation = generate(
            module.model.eval(),
            tokenizer,
            [config.sample_prompt],
            config.sample_tokens,
            sampling=Sampling(temperature=config.sample_temperature),
            seed=module.seed,
        )
    return config.sample_prompt + generation.continuations[0].text
