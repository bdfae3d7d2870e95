"""Learning rates at the points that matter, and which parameters decay."""

import pytest
import torch

from mamba3_train.errors import UserError
from mamba3_train.model import Mamba3Config, Mamba3LM, MixerConfig
from mamba3_train.training.lr_schedule import Cosine, WarmupStableDecay
from mamba3_train.training.optimizer import adamw

COMMON = {"peak_lr": 1e-3, "min_lr": 1e-5, "total_steps": 1000}


def test_cosine():
    schedule = Cosine(**COMMON, warmup_fraction=0.1)
    assert schedule(0) == pytest.approx(1e-5)
    assert schedule(49) == pytest.approx(5e-4)
    assert schedule(99) == schedule(100) == pytest.approx(1e-3)
    assert schedule(550) == pytest.approx((1e-3 + 1e-5) / 2)
    assert schedule(1000) == schedule(5000) == pytest.approx(1e-5)
    assert all(schedule(step) > schedule(step + 1) for step in range(100, 1000))


def test_warmup_stable_decay():
    schedule = WarmupStableDecay(**COMMON, warmup_fraction=0.02, decay_fraction=0.2)
    assert schedule(0) == pytest.approx(1e-3 / 20)
    assert {schedule(step) for step in range(20, 801)} == {1e-3}
    assert schedule(850) == pytest.approx(1e-5 + (1e-3 - 1e-5) * 0.5)
    assert schedule(1000) == schedule(5000) == pytest.approx(1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Cosine(**COMMON, warmup_fraction=1.5),
        lambda: WarmupStableDecay(**COMMON, warmup_fraction=0.6, decay_fraction=0.6),
        lambda: Cosine(**COMMON | {"total_steps": 0}, warmup_fraction=0.1),
    ],
)
def test_bad_schedules_are_refused(make):
    with pytest.raises(UserError, match="schedule"):
        make()


def test_groups_hold_every_parameter_once_and_decay_only_matrices():
    config = Mamba3Config(
        vocab_size=10,
        d_model=16,
        n_layers=2,
        d_mlp=8,
        layer_pattern="M*",
        mixer=MixerConfig(d_state=8, head_dim=8, rank=2),
    )
    model = Mamba3LM(config)
    optimizer = adamw(model, lr=1e-3, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1)
    decayed, kept = optimizer.param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert sorted(map(id, decayed["params"] + kept["params"])) == sorted(map(id, model.parameters()))
    assert all(p.dim() == 2 for p in decayed["params"])
    # Three-dimensional biases and projections start at 1 and must not be pulled to 0.
    assert any(p is model.layers[0].mixer.B_bias for p in kept["params"])
    assert any(p is model.layers[0].mixer.mimo_x for p in kept["params"])
    for p in model.parameters():
        torch.nn.init.ones_(p)
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert (model.embedding.weight < 1).all()
    assert (model.layers[0].mixer.D == 1).all()
