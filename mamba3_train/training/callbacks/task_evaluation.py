"""Tasks of lm-evaluation-harness while training: a bounded number of documents, every so many steps."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from mamba3_train.errors import UserError
from mamba3_train.evaluation import lm_harness
from mamba3_train.training.callbacks.throughput import Throughput
from mamba3_train.training.strategies import forward_of


class TaskEvaluation(Callback):
    """Logs `eval/TASK/METRIC` every few steps; the time it takes does not count as training's.

    All ranks make as many passes, each over documents of its own, so every strategy will do, those with shards too.

    Args:
        tasks: of lm-evaluation-harness, that score given answers.
        every_n_steps: steps between evaluations.
        limit: documents of each task.
        include_path: folder with tasks of one's own.
        tokens_per_batch: most tokens in one pass of a rank.

    Set before training starts:
        throughput: logs the rows; its clock stands still meanwhile.
        before_pass: called before every pass.

    Raises:
        UserError: a task that is unknown, whose data cannot be had, or that generates text; lm-eval is not installed.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        every_n_steps: int,
        limit: int,
        include_path: str | Path | None,
        tokens_per_batch: int,
    ):
        for key, value in (("every_n_steps", every_n_steps), ("limit", limit), ("tokens_per_batch", tokens_per_batch)):
            if value < 1:
                raise UserError(f"evaluation.{key}={value} must be at least 1")
        self.every_n_steps, self.limit, self.tokens_per_batch = every_n_steps, limit, tokens_per_batch
        self.throughput: Throughput | None = None
        self.before_pass: Callable[[], None] = lambda: None
        self._loaded = lm_harness.load_tasks(tasks, include_path=include_path)
        for name, task in self._loaded["tasks"].items():
            if task.OUTPUT_TYPE == "generate_until":
                raise UserError(
                    f"evaluation.tasks: {name} generates text, which models in shards cannot do while they train; "
                    "evaluate it afterwards by python -m mamba3_train.evaluate"
                )

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """See to it that there is a text to evaluate.

        Raises:
            UserError: the data has no tokenizer.
        """
        if not trainer.datamodule.documents():
            raise UserError("evaluation.tasks are texts, but the data is a synthetic task: set evaluation.tasks=[]")

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch, batch_idx: int) -> None:
        """Evaluate when the step has come."""
        if trainer.global_step % self.every_n_steps:
            return
        begin = time.perf_counter()
        found = self.evaluate(trainer, module)
        self.throughput.leave_out(time.perf_counter() - begin)
        self.throughput.log_row(trainer, **{f"eval/{name}": value for name, value in found.items()})

    def evaluate(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        """Values by `TASK/METRIC`, the same on every rank."""
        strategy, data = trainer.strategy, trainer.datamodule

        def forward(tokens: Tensor) -> Tensor:
            self.before_pass()
            with strategy.precision_plugin.forward_context():
                return forward_of(strategy, module.model)(tokens)

        model = lm_harness.HarnessModel(
            forward,
            data.tokenizer,
            module.device,
            max_length=data.sequence_length,
            tokens_per_batch=self.tokens_per_batch,
        )
        with torch.compiler.set_stance("force_eager"):  # every length would be compiled for itself
            results = lm_harness.evaluate_tasks(model, self._loaded, limit=self.limit)
        return {
            f"{task}/{metric}": float(value)
            for task, metrics in results.items()
            for metric, value in metrics.items()
            if not metric.endswith("_stderr") and not metric.startswith("sample_")
        }
