"""Spaces: what yaml says, what Hydra gets, what is refused."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from mamba3_train.errors import UserError
from mamba3_train.sweeping.space import Choice, Interval, grid, hydra_text, read_space
from mamba3_train.sweeping.trial_command import TrialCommand

CONFIG = OmegaConf.create(
    {
        "optimizer": {"lr": 4e-3, "betas": [0.9, 0.95]},
        "model": {"n_layers": 4, "pattern": "M", "tied": True},
        "schedule": {"peak": 1},
        "path": "???",
    }
)


def test_dimensions_of_every_kind():
    space = {
        "optimizer": {
            "lr": {"log_uniform": ["0.25x", "4x"], "points": 5},
            "betas": {"choice": [[0.9, 0.95], [0.8, 0.9]]},
        },
        "model": {"n_layers": {"int": ["1x", 10], "step": 3}, "tied": {"choice": [True, False]}},
        "schedule": {"choice": ["cosine", "wsd"]},
        "path": {"choice": ["a"]},
    }
    lr, betas, layers, tied, schedule, path = read_space(space, CONFIG)
    assert lr == Interval("optimizer.lr", 1e-3, 1.6e-2, log=True, integer=False, points=5)
    assert lr.grid() == [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
    assert layers == Interval("model.n_layers", 4, 10, log=False, integer=True, step=3)
    assert layers.grid() == [4, 7, 10]
    assert (tied, path) == (Choice("model.tied", (True, False)), Choice("path", ("a",)))
    assert betas.value("[0.8,0.9]") == [0.8, 0.9]
    points = grid([layers, schedule])
    assert len(points) == 6
    assert points[1] == {"model.n_layers": 4, "schedule": "wsd"}


@pytest.mark.parametrize(
    ("space", "complaint"),
    [
        ({}, "sweep.space is empty"),
        ({"optimizer": {"lrr": {"uniform": [0, 1]}}}, "unknown key optimizer.lrr. Did you mean lr?"),
        ({"optimiser": {"lr": {"uniform": [0, 1]}}}, "unknown key optimiser.lr."),
        ({"optimizer": {"lr": {"loguniform": [0.1, 1]}}}, "optimizer.lr: unknown loguniform. Did you mean log_uniform"),
        ({"optimizer": {"lr": 0.1}}, "optimizer.lr=0.1 must say how to search it"),
        ({"optimizer": {"lr": {"uniform": [0, 1], "choice": [1]}}}, "e.g. '~sweep.space.optimizer.lr.uniform'"),
        ({"optimizer": {"lr": {"points": 3}}}, "must have one of uniform"),
        ({"optimizer": {"lr": {"uniform": 3}}}, "optimizer.lr.uniform=3 must be a list"),
        ({"optimizer": {"lr": {"uniform": [1, 0.5]}}}, "must be [low, high] with low < high"),
        ({"optimizer": {"lr": {"log_uniform": [0, 1]}}}, "with 0 < low < high"),
        ({"optimizer": {"lr": {"uniform": ["a", "b"]}}}, "'a' is not a number"),
        ({"optimizer": {"lr": {"choice": ["fast"]}}}, "'fast' does not fit, the config has 0.004"),
        ({"optimizer": {"lr": {"uniform": [0, 1], "points": 0}}}, "points=0 must be a whole number"),
        ({"optimizer": {"lr": {"uniform": [0, 1], "step": 2}}}, "step=2 goes with int, not with uniform"),
        ({"model": {"n_layers": {"uniform": [1, 2]}}}, "which is whole: use int"),
        ({"model": {"n_layers": {"choice": ["0.3x"]}}}, "1.2 does not fit, the config has 4"),
        ({"model": {"n_layers": {"int": [1.5, 2]}}}, "1.5 is not a whole number"),
        ({"model": {"pattern": {"choice": [3]}}}, "3 does not fit, the config has 'M'"),
        ({"model": {"tied": {"choice": ["2x"]}}}, "2x is a multiple, but the config has True"),
        ({"model": {"choice": [3]}}, "3 does not fit, the config has a section"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes(space, complaint):
    with pytest.raises(UserError) as error:
        read_space(space, CONFIG)
    assert complaint in str(error.value)


def test_an_interval_without_points_is_no_grid():
    with pytest.raises(UserError, match="has no points"):
        Interval("optimizer.lr", 0.1, 1, log=False, integer=False).grid()


@pytest.mark.parametrize(
    "value",
    [1e-5, 0.001235, 3, -2, True, None, "wsd", "440m", "1e-3", "true", "null", "a b", "it's", "a\\'b\\", "x,y", "",
     "${run.name}", [0.9, 0.95], ["a", "it's"], {"web": 0.7, "code": [1, 2]}, "runs/a=b"],
    ids=repr,
)  # fmt: skip
def test_hydra_reads_what_is_written(value):
    assert OverridesParser.create().parse_override(f"key={hydra_text(value)}").value() == value


def test_equal_tokens_whatever_the_batch():
    command = TrialCommand(["+recipe=a"], max_steps=1000, validate_every=100, rows=8, length=64, equal_tokens=True)
    values = {"data.global_batch_size": 32, "optimizer.lr": 0.1}
    drawn = ["data.global_batch_size=32", "optimizer.lr=0.1"]
    overrides = [*drawn, "trainer.max_steps=250", "validation.every_n_steps=25"]
    assert command.overrides(values) == overrides
    assert command.arguments(values, name="x") == ["+recipe=a", *overrides, "run.name=x"]
    assert command.steps(values) == 250
    assert command.steps({"optimizer.lr": 0.1}) == 1000
    assert command.steps({"trainer.max_steps": 7}) == 7
    longer = command.overrides({"data.sequence_length": 128})
    assert longer == ["data.sequence_length=128", "trainer.max_steps=500", "validation.every_n_steps=50"]
    at_equal_steps = TrialCommand(**(vars(command) | {"equal_tokens": False}))
    assert at_equal_steps.overrides(values) == drawn
