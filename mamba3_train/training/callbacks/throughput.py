"""The logged rows: loss, learning rate, speed, utilisation, waiting for data, and memory."""

import math
import time

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from mamba3_train.training.callbacks.norms import Norms
from mamba3_train.training.data_cursor import DataCursor
from mamba3_train.training.device_wait import DeviceWait
from mamba3_train.training.hardware import peak_flops, peak_memory_gib


class Throughput(Callback):
    """Logs a row every few steps and one after each validation.

    Speed is that of the steps since the last row: waiting for data and saving count, validation does not. MFU is
    training FLOPs over the devices' dense bfloat16 peak, null on a device whose peak is not known. `data_wait` is the
    share of that time in which the device that waited longest had no batch. Must come before callbacks that do work of
    their own when a step begins, so that it does not pass for waiting.

    Args:
        every_n_steps: steps between rows.
        tokens_per_step: tokens of the global batch.
        flops_per_token: training FLOPs by `model/cost.py`.
        norms: what else a row tells.
        cursor: where the data is at a step.
    """

    def __init__(
        self, *, every_n_steps: int, tokens_per_step: int, flops_per_token: float, norms: Norms, cursor: DataCursor
    ):
        self.norms, self.cursor = norms, cursor
        self.every_n_steps = every_n_steps
        self.tokens_per_step = tokens_per_step
        self.flops_per_token = flops_per_token
        self.data_wait_a_step = 0.0
        """Seconds a step that this rank's device waited for data, between the last two rows."""
        self.last_row: dict[str, float | None] = {}
        """The newest values of everything logged so far."""

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Start the clock."""
        name = torch.cuda.get_device_name(module.device) if module.device.type == "cuda" else "cpu"
        self._peak = peak_flops(name)
        self._wait = DeviceWait(module.device)
        self._last_time, self._last_step = time.perf_counter(), None

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch, batch_idx: int) -> None:
        """Note when the batch is there, and at the first step where the run goes on from."""
        self._wait.step_begins()
        if self._last_step is None:
            self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch, batch_idx: int) -> None:
        """Log a row when its step has come; only then is the device waited for."""
        step = trainer.global_step
        if step % self.every_n_steps == 0 or step == trainer.max_steps:
            self._log_step(trainer, module, outputs, step)
        self._wait.step_ended()

    def count_from(self, step: int) -> None:
        """The run was rolled back to a step: speed is measured from here on."""
        self._last_time, self._last_step = time.perf_counter(), step

    def _log_step(self, trainer: Trainer, module: LightningModule, outputs, step: int) -> None:
        values = outputs | self.norms.take(module)
        values = {name: value.item() for name, value in values.items()}
        now = time.perf_counter()
        seconds = now - self._last_time
        steps = step - self._last_step
        rate = steps * self.tokens_per_step / seconds
        waited = self._wait.seconds()
        self.data_wait_a_step = waited / steps
        waited = torch.tensor(waited, device=module.device)
        waited = trainer.strategy.reduce(waited, reduce_op="max").item()
        self._last_time, self._last_step = now, step
        mfu = None if self._peak is None else rate * self.flops_per_token / (self._peak * trainer.world_size)
        self.log_row(
            trainer,
            **values,
            lr=module.optimizers().param_groups[0]["lr"],
            tokens_per_second=round(rate, 1),
            tokens_per_second_per_gpu=round(rate / trainer.world_size, 1),
            mfu=mfu,
            data_wait=round(waited / seconds, 4),
            **self._epochs(trainer, step),
            peak_memory_gib=round(peak_memory_gib(module.device), 3),
        )

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Stop the clock."""
        self._validation_start = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Log the validation loss and let the clock run on."""
        if trainer.state.fn == "fit":
            self._last_time += time.perf_counter() - self._validation_start
            self._wait.step_ended()
        if "val/loss" in trainer.callback_metrics:
            self.log_row(trainer, **{"val/loss": trainer.callback_metrics["val/loss"].item()})

    def leave_out(self, seconds: float) -> None:
        """Do not count time, since the end of the step, in which something else was done."""
        self._last_time += seconds
        self._wait.step_ended()

    def log_row(self, trainer: Trainer, **values: float | None) -> None:
        """A row of this step, to all loggers."""
        step = trainer.global_step
        # JSON has no number that is not finite.
        values = {name: value if value is None or math.isfinite(value) else None for name, value in values.items()}
        row = {"step": step, "tokens": step * self.tokens_per_step, **values}
        self.last_row |= row
        for logger in trainer.loggers:
            logger.log_metrics(row, step=step)

    def _epochs(self, trainer: Trainer, step: int) -> dict[str, float]:
        """How often each source of the data has been read through, as `epochs/NAME`."""
        data = trainer.datamodule
        if data is None:
            return {}
        return {f"epochs/{name}": round(value, 4) for name, value in data.epochs(self.cursor.samples(step)).items()}
