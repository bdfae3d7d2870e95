"""Every filter against a plain reading of its definition, their order, and what the draws depend on."""

import math

import pytest
import torch

from mamba3_train.errors import UserError
from mamba3_train.evaluation.sampling import Sampling, uniform_numbers

LOGITS = [2.0, 1.0, 1.0, 0.5, -1.0, 3.0, -2.0, 0.9]


def softmax(logits):
    weights = [math.exp(logit) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def kept(logits=LOGITS, **settings):
    filtered = Sampling(**settings).filtered(torch.tensor([logits]))[0]
    for value, logit in zip(filtered.tolist(), logits, strict=True):
        assert value == pytest.approx(logit) or value == -math.inf
    return {index for index, value in enumerate(filtered.tolist()) if value != -math.inf}


def smallest_set_reaching(p, logits=LOGITS):
    probabilities, chosen = softmax(logits), set()
    for index in sorted(range(len(logits)), key=lambda i: -logits[i]):
        chosen.add(index)
        if sum(probabilities[i] for i in chosen) >= p:
            return chosen
    return chosen


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8, 100])
def test_top_k_keeps_the_k_likeliest_and_ties(k):
    smallest = sorted(LOGITS, reverse=True)[min(k, len(LOGITS)) - 1]
    assert kept(top_k=k) == {index for index, logit in enumerate(LOGITS) if logit >= smallest}


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.7, 0.9, 0.99, 0.9999])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p):
    assert kept(top_p=p) == smallest_set_reaching(p)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.3, 0.8, 1.0])
def test_min_p_is_a_share_of_the_likeliest(p):
    probabilities = softmax(LOGITS)
    assert kept(min_p=p) == {i for i, q in enumerate(probabilities) if q >= p * max(probabilities)}


def test_each_filter_sees_what_the_one_before_left():
    logits = [2.0, 1.9, 1.8, 1.7, 1.6]
    assert smallest_set_reaching(0.6, logits) == {0, 1, 2}
    # Of the three that top-k leaves, two reach the same share.
    assert kept(logits, top_k=3, top_p=0.6) == {0, 1} == smallest_set_reaching(0.6, logits[:3])
    assert kept(logits, top_k=4, top_p=0.99, min_p=0.85) == {0, 1}


def test_filters_come_after_the_temperature():
    """At temperature 4 the likeliest token alone no longer reaches a half."""
    uniform = torch.linspace(0, 0.999, 50, dtype=torch.float64)
    logits = torch.tensor([[3.0, 1.0, 0.0]]).expand(50, -1)
    assert set(Sampling(top_p=0.5).choose(logits, None, uniform).tolist()) == {0}
    assert set(Sampling(top_p=0.5, temperature=4.0).choose(logits, None, uniform).tolist()) == {0, 1}


def test_the_penalty_makes_what_occurred_less_likely_whatever_its_sign():
    seen = torch.tensor([[True, False, True, False]])
    greedy = Sampling(temperature=0, repetition_penalty=2.0)

    def choose(*logits):
        return int(greedy.choose(torch.tensor([logits]), seen, torch.zeros(1)))

    assert choose(3.0, 1.6, 0.0, 0.0) == 1, "3 / 2 is less than 1.6"
    assert choose(3.0, 1.4, 0.0, 0.0) == 0
    assert choose(-9.0, -9.0, -1.0, -1.9) == 3, "-1 · 2 is less than -1.9"
    assert choose(-9.0, -9.0, -1.0, -2.1) == 2


def test_draws_have_the_probabilities():
    uniform = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    drawn = Sampling(temperature=1.5).choose(torch.tensor([LOGITS]).expand(10_000, -1), None, uniform)
    counts = torch.bincount(drawn, minlength=len(LOGITS)) / 10_000
    expected = torch.tensor(softmax([logit / 1.5 for logit in LOGITS]))
    assert torch.allclose(counts, expected, atol=1.1e-4), "evenly spread numbers hit every share to one in 10,000"


def test_what_is_left_out_is_never_drawn():
    uniform = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    logits = torch.tensor([[-50.0, 1.0, 2.0, 1.5, -50.0]]).expand(2, -1)
    assert Sampling(top_k=3).choose(logits, None, uniform).tolist() == [1, 3]


def test_numbers_of_a_row_depend_on_its_seed_alone():
    numbers = uniform_numbers(5, 3, 10)
    assert torch.equal(numbers[1], uniform_numbers(6, 1, 10)[0])
    assert torch.equal(numbers[:, :4], uniform_numbers(5, 3, 4))
    assert not torch.equal(numbers[0], numbers[1])


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be between 0.0 and inf"),
        ({"top_p": 1.5}, "top_p=1.5 must be between 0.0 and 1.0"),
        ({"min_p": float("nan")}, "min_p=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0"),
    ],
)
def test_values_without_meaning_are_refused(settings, complaint):
    with pytest.raises(UserError, match=complaint):
        Sampling(**settings)
