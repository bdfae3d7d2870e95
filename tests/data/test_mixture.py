"""Mixtures: exact shares over every window, found by arithmetic, and weights that change on the row."""

import numpy as np
import pytest

from mamba3_train.data.mixture import CYCLE, Mixture, Stage, read_stages
from mamba3_train.errors import UserError

WEIGHTS = [{"a": 1}, {"a": 7, "b": 3}, {"a": 0.5, "b": 0.3, "c": 0.2}, {"a": 1, "b": 1, "c": 1, "d": 0.001, "e": 5}]


@pytest.mark.parametrize("weights", WEIGHTS, ids=len)
def test_shares_are_exact_over_every_window(weights):
    sources, _ = Mixture([Stage(0, weights)], list(weights)).assign(np.arange(2 * CYCLE))
    shares = np.array(list(weights.values())) / sum(weights.values())
    counts = np.concatenate([np.zeros((1, len(weights))), np.cumsum(np.eye(len(weights))[sources], axis=0)])
    for width in (1, 2, 7, 100, 1234, CYCLE):
        windows = counts[width:] - counts[:-width]
        assert np.abs(windows - width * shares).max() < 2
    assert np.array_equal(counts[-1] / (2 * CYCLE), np.round(shares * CYCLE) / CYCLE)


def test_every_source_is_read_in_its_own_order():
    """Over stages and far beyond the first cycle, a source's samples are numbered 0, 1, 2, …"""
    stages = [Stage(0, {"a": 0.9, "b": 0.1}), Stage(12_345, {"a": 0.2, "b": 0.5, "c": 0.3}), Stage(30_001, {"c": 1})]
    mixture = Mixture(stages, ["a", "b", "c"])
    sources, indices = mixture.assign(np.arange(45_000))
    for number in range(3):
        assert np.array_equal(indices[sources == number], np.arange((sources == number).sum()))
    assert (sources[:12_345] == 2).sum() == 0
    assert (sources[30_001:] == 2).all()
    for position in (0, 1, 12_344, 12_345, 20_000, 30_001, 44_000):
        assert mixture.consumed(position) == dict(zip("abc", np.bincount(sources[:position], minlength=3), strict=True))


def test_a_trillion_samples_by_arithmetic():
    mixture = Mixture([Stage(0, {"a": 3, "b": 1}), Stage(10**11, {"a": 1, "b": 1})], ["a", "b"])
    sources, indices = mixture.assign(10**12 + np.arange(4))
    assert mixture.consumed(10**12) == {"a": 75 * 10**9 + 45 * 10**10, "b": 25 * 10**9 + 45 * 10**10}
    assert indices[sources == 0][0] == mixture.consumed(10**12)["a"]


def test_a_stage_begins_with_the_first_row_after_its_token():
    stages = read_stages([{"weights": {"a": 1}}, {"from_tokens": 1000, "weights": {"b": 1}}], 256)
    assert [stage.begin for stage in stages] == [0, 4]
    (_, late) = read_stages([{"weights": {"a": 1}}, {"from_tokens": 9e4, "weights": {"b": 1}}], 9)
    assert isinstance(late.begin, int)
    assert late.begin == 10_000


@pytest.mark.parametrize(
    ("mixture", "words"),
    [
        ({"x": 1}, ["source x", "a, b"]),
        ({"a": -1, "b": 2}, ["at least 0"]),
        ({"a": 0}, ["not all 0"]),
        ([{"from_tokens": 5, "weights": {"a": 1}}], ["begin at 0"]),
        ([{"weights": {"a": 1}}, {"weights": {"b": 1}}], ["rise"]),
        ("a", ["from_tokens"]),
        ([{"weights": {"a": 1}}, {"from_tokens": 0.5, "weights": {"b": 1}}], ["from_tokens"]),
        ([{"weight": {"a": 1}}], ["from_tokens"]),
    ],
)
def test_mistakes_are_explained(mixture, words):
    with pytest.raises(UserError) as error:
        Mixture(read_stages(mixture, 8), ["a", "b"])
    assert all(word in str(error.value) for word in words)
