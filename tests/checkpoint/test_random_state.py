"""The generators go on where they were."""

import random

import numpy as np
import torch

from mamba3_train.checkpoint.random_state import random_tensors, seed_generators, set_random_tensors


def draws():
    # An odd number of normal ones: the other of the pair waits in the generator.
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.normal(), torch.rand(3).tolist()


def test_generators_go_on_where_they_were():
    draws()
    state = random_tensors(rank=7)
    assert {name.rpartition(".")[0] for name in state} == {"random.00007"}
    expected = [draws() for _ in range(3)]
    draws()
    set_random_tensors(state)
    assert [draws() for _ in range(3)] == expected


def test_ranks_and_steps_draw_differently_and_again_the_same():
    def of(*arguments):
        seed_generators(*arguments)
        return draws()

    assert of(1, 0, 0) == of(1, 0, 0)
    different = [of(1, 0, 0), of(1, 0, 1), of(1, 1, 0), of(2, 0, 0)]
    for columns in zip(*different, strict=True):
        assert len({str(value) for value in columns}) == len(different)
