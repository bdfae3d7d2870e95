"""A row when its step has come; no other step waits for the device."""

from types import SimpleNamespace

import pytest
import torch

from mamba3_train.training.callbacks import Norms, Throughput
from mamba3_train.training.data_cursor import DataCursor


class OnTheDevice:
    """A value that may not be read, as reading it would wait for the device."""

    def __getattr__(self, name):
        pytest.fail(f"{name} of a value on the device was asked for in a step that is not logged")


@pytest.fixture
def run():
    """The callback in a run of ten steps on two devices, with a row every fifth; its rows are in `rows`."""
    model = torch.nn.Linear(2, 2)
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.5}])
    rows = []
    logger = SimpleNamespace(log_metrics=lambda row, step: rows.append(row))
    trainer = SimpleNamespace(
        global_step=0, max_steps=12, world_size=2, datamodule=None, loggers=[logger],
        strategy=SimpleNamespace(reduce=lambda value, reduce_op: value),
    )  # fmt: skip
    module = SimpleNamespace(
        model=model, device=torch.device("cpu"), gradient_clip_norm=1.0, optimizers=lambda: optimizer, trainer=trainer
    )
    norms = Norms(every_n_steps=5, of_layers=True)
    callback = Throughput(every_n_steps=5, tokens_per_step=100, flops_per_token=1.0, norms=norms, cursor=DataCursor(4))
    callback.on_train_start(trainer, module)

    def step(outputs):
        callback.on_train_batch_start(trainer, module, None, 0)
        norms.on_before_optimizer_step(trainer, module, None)
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, module, outputs, None, 0)

    return SimpleNamespace(step=step, rows=rows)


def test_rows_come_every_few_steps_and_at_the_end_and_the_others_read_nothing(run):
    for step in range(1, 13):
        logged = {"train/loss": torch.tensor(3.0), "train/grad_norm": torch.tensor(1.0)}
        run.step(logged if step in (5, 10, 12) else dict.fromkeys(logged, OnTheDevice()))
    assert [row["step"] for row in run.rows] == [5, 10, 12]
    for row in run.rows:
        assert row["tokens"] == 100 * row["step"]
        assert row["tokens_per_second_per_gpu"] == pytest.approx(row["tokens_per_second"] / 2, abs=0.1)
        assert row["train/update_norm"] == 0.0
        assert row["mfu"] is None
