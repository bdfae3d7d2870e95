"""Names the rank that the others wait for."""

import logging
import socket
import statistics

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from mamba3_train.training.callbacks.throughput import Throughput
from mamba3_train.training.device_clock import DeviceClock

log = logging.getLogger(__name__)


class Stragglers(Callback):
    """Compares the ranks' own work in the steps that are logged, and warns of one that is slow in several in a row.

    Own work is the forward pass of the layers and waiting for data. In the rest of a step ranks wait for each other, so
    it takes the same time on all. Layers are timed from when their parameters are there (FSDP's hook comes first) to
    when their output is; under ZeRO 3, which gathers inside of them, only waiting for data tells ranks apart.

    Must come after Throughput, which waits for the device and knows how long this rank waited for data.

    Args:
        every_n_steps: steps between rows.
        factor: times the median of the others' time from which a rank is slow; 0 compares nothing.
        throughput: see above.
    """

    ROWS = 3

    def __init__(self, *, every_n_steps: int, factor: float, throughput: Throughput):
        self.every_n_steps, self.factor, self.throughput = every_n_steps, factor, throughput
        self._hooks: list = []

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Learn the ranks' hosts."""
        self._hosts = _of_all_ranks(socket.gethostname(), trainer)
        self._slow_rows = [0] * trainer.world_size
        self._clock = DeviceClock(module.device)

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch, batch_idx: int) -> None:
        """Time the layers if the step that begins is logged."""
        step = trainer.global_step + 1
        if not self.factor or trainer.world_size == 1 or (step % self.every_n_steps and step != trainer.max_steps):
            return
        self._begins, self._ends = [], []
        for layer in module.model.layers:
            self._hooks += [
                layer.register_forward_pre_hook(lambda *_: self._begins.append(self._clock.now())),
                layer.register_forward_hook(lambda *_: self._ends.append(self._clock.now()), prepend=True),
            ]

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch, batch_idx: int) -> None:
        """Compare."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        forward = self._clock.seconds(list(zip(self._begins, self._ends, strict=True)))
        seconds = _of_all_ranks(forward + self.throughput.data_wait_a_step, trainer)
        for rank, (own, others) in enumerate(zip(seconds, _medians_of_others(seconds), strict=True)):
            slow = own > self.factor * others
            self._slow_rows[rank] = self._slow_rows[rank] + 1 if slow else 0
            if self._slow_rows[rank] == self.ROWS and trainer.is_global_zero:
                log.warning(
                    "rank %d on %s is slower than the others: %.4g seconds for its layers' forward pass and its data, "
                    "the median of the others %.4g, and so for %d rows",
                    rank, self._hosts[rank], own, others, self.ROWS,
                )  # fmt: skip


def _medians_of_others(values: list[float]) -> list[float]:
    return [statistics.median(values[:i] + values[i + 1 :]) for i in range(len(values))]


def _of_all_ranks(value, trainer: Trainer) -> list:
    """Every rank's value, exchanged in host memory."""
    values = [value] * trainer.world_size
    if trainer.world_size > 1:
        dist.all_gather_object(values, value)
    return values
