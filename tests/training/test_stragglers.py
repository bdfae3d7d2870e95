"""Which rank is called slow, and when; that waiting for parameters is no work of a rank's own is in test_guards.py."""

from types import SimpleNamespace

import pytest
import torch

from mamba3_train.training.callbacks import Stragglers, stragglers


@pytest.fixture
def compare(monkeypatch):
    """Feeds rows of all ranks' seconds to the callback of rank 0; returns what it warned of."""

    def run(rows, **settings):
        exchanged = iter([["n0", "n1", "n2", "n3"], *rows])
        monkeypatch.setattr(stragglers, "_of_all_ranks", lambda value, trainer: next(exchanged))
        layer = torch.nn.Linear(2, 2)
        module = SimpleNamespace(device=torch.device("cpu"), model=SimpleNamespace(layers=[layer]))
        trainer = SimpleNamespace(world_size=4, is_global_zero=True, max_steps=100, global_step=0)
        callback = Stragglers(every_n_steps=2, throughput=SimpleNamespace(data_wait_a_step=0.0), **settings)
        callback.on_train_start(trainer, module)
        for _ in range(2 * len(rows)):
            callback.on_train_batch_start(trainer, module, None, 0)
            layer(torch.ones(1, 2))
            trainer.global_step += 1
            assert bool(layer._forward_hooks) == (trainer.global_step % 2 == 0), "only steps that are logged are timed"
            callback.on_train_batch_end(trainer, module, None, None, 0)
            assert not layer._forward_hooks
        return next(exchanged, None)

    return run


SLOW, EVEN = [1.0, 1.1, 2.0, 0.9], [1.0, 1.1, 1.2, 0.9]


@pytest.mark.parametrize(
    ("rows", "warnings"), [([SLOW] * 2, 0), ([SLOW] * 5, 1), ([SLOW, SLOW, EVEN] * 3, 0), ([EVEN] * 5, 0)]
)
def test_a_rank_is_named_once_that_is_slow_three_rows_in_a_row(rows, warnings, compare, caplog):
    assert compare(rows, factor=1.5) is None, "every row was compared"
    assert len(caplog.records) == warnings
    if warnings:
        assert "rank 2 on n2 is slower than the others: 2 seconds" in caplog.text
        assert "the median of the others 1, and so for 3 rows" in caplog.text


def test_nothing_is_timed_without_a_factor():
    layer = torch.nn.Linear(2, 2)
    module = SimpleNamespace(device=torch.device("cpu"), model=SimpleNamespace(layers=[layer]))
    callback = Stragglers(every_n_steps=1, factor=0.0, throughput=None)
    trainer = SimpleNamespace(world_size=2, global_step=0, max_steps=9)
    callback.on_train_batch_start(trainer, module, None, 0)
    assert not layer._forward_hooks
