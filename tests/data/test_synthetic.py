"""Synthetic tasks: answers against brute force, and rows that depend on seed and index alone."""

from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mamba3_train.data import SyntheticDataModule
from mamba3_train.data.packing import IGNORED_LABEL
from mamba3_train.data.synthetic import TRAINING, SyntheticRows
from mamba3_train.data.synthetic_tasks import BracketedArithmetic, ModularArithmetic, Needle, Parity, below, distinct
from mamba3_train.errors import UserError

SYMBOLS = "01234+-*()"
TASKS = [Parity(), ModularArithmetic(5), BracketedArithmetic(5), Needle(values=5, keys=6, noise=3, needles=4)]


def drawn(task, lengths):
    return np.random.default_rng(1).random((task.draws_per_token, sum(lengths)), dtype=np.float32)


def documents(task, lengths, count=40):
    """Documents of several lengths, made together in a mixed order."""
    lengths = np.array(list(lengths) * count)
    tokens, labels = task.documents(drawn(task, lengths), lengths)
    assert tokens.shape == labels.shape == (lengths.sum(),)
    assert ((tokens >= 0) & (tokens < task.vocab_size)).all()
    assert ((labels == IGNORED_LABEL) | (labels >= 0) & (labels < task.answers)).all()
    ends = lengths.cumsum()
    assert (labels[ends - 1] != IGNORED_LABEL).all(), "the last token is asked for"
    for ours, theirs in zip(np.split(tokens, ends[:-1]), np.split(labels, ends[:-1]), strict=True):
        yield len(ours), ours.tolist(), theirs.tolist()


def test_parity_counts_ones():
    for length, tokens, labels in documents(Parity(), [1, 2, 7, 40]):
        assert len(tokens) == length
        assert labels == [sum(tokens[: i + 1]) % 2 for i in range(length)]


def test_arithmetic_is_pythons():
    products = set()
    for _, tokens, labels in documents(ModularArithmetic(5), [1, 3, 9, 41]):
        text = "".join(SYMBOLS[token] for token in tokens)
        for i, label in enumerate(labels):
            assert label == (IGNORED_LABEL if i % 2 else eval(text[: i + 1]) % 5), text
        products |= {part.count("*") for part in text.replace("-", "+").split("+")}
    assert products >= {0, 1, 2, 3, 4}, "also products of several factors"


def test_brackets_are_pythons_and_every_closing_one_has_its_value():
    for length, tokens, labels in documents(BracketedArithmetic(5), [1, 2, 3, 4, 5, 6, 17, 60]):
        assert len(tokens) == length
        text = "".join(SYMBOLS[token] for token in tokens)
        open_at = []
        for i, symbol in enumerate(text):
            if symbol == "(":
                open_at.append(i)
            elif symbol == ")":
                assert labels[i] == eval(text[open_at.pop() : i + 1]) % 5, text
            elif i < length - 1:
                assert labels[i] == IGNORED_LABEL
        assert not open_at
        assert labels[-1] == eval(text) % 5


def test_brackets_are_split_by_the_draws_where_they_open():
    def write(draws):
        """One expression by itself, the draws of its tokens being given."""
        if len(draws) <= 2:
            return "-" * (len(draws) - 1) + str(int(draws[-1] * 5))
        if len(draws) <= 4:
            return f"({write(draws[1:-1])})"
        left = 1 + int(draws[0] * (len(draws) - 4))
        operator = "+-*"[int(draws[1 + left] * 3)]
        return f"({write(draws[1 : 1 + left])}{operator}{write(draws[2 + left : -1])})"

    task, lengths = BracketedArithmetic(5), [1, 2, 3, 4, 5, 6, 17, 60]
    draws = drawn(task, lengths * 40)[0]
    for length, tokens, _ in documents(task, lengths, 40):
        assert "".join(SYMBOLS[token] for token in tokens) == write(draws[:length].tolist())
        draws = draws[length:]


def test_needles_are_found_by_looking():
    task = Needle(values=5, keys=6, noise=3, needles=4)
    assert task.shortest == 13
    for length, tokens, labels in documents(task, [13, 20, 64]):
        asked = tokens.index(task.question) + 1
        assert length == asked + 4
        assert labels[:asked] == [IGNORED_LABEL] * asked
        assert len(set(tokens[asked:])) == 4, "every key once"
        for key, answer in zip(tokens[asked:], labels[asked:], strict=True):
            places = [i for i in range(asked) if tokens[i] == key]
            assert len(places) == 1
            assert tokens[places[0] + 1] == answer


def test_every_choice_has_the_same_chance():
    assert all(below(end, np.float32(1 - 2**-24)) == end - 1 for end in range(1, 2000))
    # Draws in the middle of each of 5 · 4 · 3 equal boxes choose each of as many ordered triples once.
    grid = np.stack(np.meshgrid(*((np.arange(n) + 0.5) / n for n in (5, 4, 3))), axis=-1).reshape(-1, 3)
    assert set(map(tuple, distinct(5, grid).tolist())) == set(permutations(range(5), 3))
    assert distinct(np.array([3, 9]), np.full((2, 3), 0.999)).tolist() == [[2, 1, 0], [8, 7, 6]]


def module(rank=0, world_size=1, samples_consumed=0, total_steps=6, **settings):
    defaults = {
        "task": Parity(), "vocab_size": 2, "sequence_length": 32, "shortest": 3, "longest": [4, 24],
        "curriculum_steps": 5, "global_batch_size": 8, "micro_batch_size": 2, "seed": 3, "num_workers": 0,
        "validation_sequences": 5,
    }  # fmt: skip
    data = SyntheticDataModule(**(defaults | settings))
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
    data.samples_consumed, data.total_steps = samples_consumed, total_steps
    data.setup()
    return data


def global_batches(world_size=1, **settings):
    parts = [list(module(rank, world_size, **settings).train_dataloader()) for rank in range(world_size)]
    return [{key: torch.cat([part[key] for part in step]) for key in step[0]} for step in zip(*parts, strict=True)]


def equal(ours, theirs):
    return len(ours) == len(theirs) and all(
        torch.equal(a[key], b[key]) for a, b in zip(ours, theirs, strict=True) for key in a
    )


def test_batches_are_the_same_on_any_number_of_ranks_and_after_a_stop():
    whole = global_batches()
    assert len(whole) == 6
    assert equal(global_batches(world_size=4, num_workers=2), whole)
    assert equal(global_batches(world_size=2, samples_consumed=2 * 8), whole[2:])
    assert not equal(global_batches(seed=4), whole)


def test_rows_hold_documents_that_grow_and_start_afresh():
    lengths = []
    for batch in global_batches():
        assert batch["input_ids"].shape == batch["labels"].shape == batch["document_ids"].shape == (8, 32)
        for bits, labels, documents in zip(*(batch[k] for k in ("input_ids", "labels", "document_ids")), strict=True):
            for number in range(int(documents[-1]) + 1):
                here = documents == number
                assert torch.equal(labels[here], bits[here].cumsum(0) % 2)
        lengths.append([int((row == 0).sum()) for row in batch["document_ids"]])
    assert all(3 <= n <= 4 for n in lengths[0])
    assert max(lengths[1]) <= 8
    assert max(lengths[5]) > 12, "the curriculum is over"
    data = module()
    assert [data.training.longest_at(8 * step) for step in (0, 1, 4, 5, 99)] == [4, 8, 20, 24, 24]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_a_row_depends_on_its_index_alone(task):
    rows = SyntheticRows(task, seed=3, sequence_length=50, shortest=13)
    wanted = [(5, 14), (6, 50), (1000, 29), (6, 50), (7, 13)]
    together, alone = rows.batch(wanted, TRAINING), [rows.batch([row], TRAINING) for row in wanted]
    for key in together:
        assert torch.equal(together[key], torch.cat([row[key] for row in alone]))


def test_rows_of_parity_are_those_that_its_recorded_results_were_trained_on():
    rows = SyntheticRows(Parity(), seed=0, sequence_length=160, shortest=3)
    for index in range(50):
        rng = np.random.default_rng([0, TRAINING, index])
        length = int(rng.integers(3, 41))
        documents = [rng.integers(2, size=length) for _ in range(-(-160 // length))]
        batch = rows.batch([(index, 40)], TRAINING)
        assert batch["input_ids"][0].tolist() == np.concatenate(documents)[:160].tolist()
        assert batch["document_ids"][0].tolist() == [place // length for place in range(160)]


def test_validation_is_the_same_set_on_any_number_of_ranks_and_none_of_training():
    def targets(world_size):
        rows = []
        for rank in range(world_size):
            for batch in module(rank, world_size).val_dataloader():
                asked = (batch["labels"] != IGNORED_LABEL).any(dim=1)
                rows += [tuple(ids.tolist()) for ids in batch["input_ids"][asked]]
        return rows

    assert len(targets(1)) == 5
    assert sorted(targets(2)) == sorted(targets(1))
    seen = {tuple(row.tolist()) for batch in global_batches() for row in batch["input_ids"]}
    assert not seen & set(targets(1))


def test_examples_end_with_their_answer():
    tokens, answers = module().rows.examples(17, 50)
    assert tokens.shape == (50, 17)
    assert torch.equal(answers, tokens.sum(1) % 2)
    arithmetic = SyntheticRows(ModularArithmetic(), seed=0, sequence_length=32, shortest=3)
    assert arithmetic.examples(20, 5)[0].shape == (5, 19), "numbers and what joins them are odd together"
    with pytest.raises(UserError, match="no document of 12 tokens: the shortest of the task has 13"):
        SyntheticRows(Needle(), seed=0, sequence_length=32, shortest=13).examples(12, 1)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"vocab_size": 3}, "data.vocab_size=3, but the task has 2 tokens"),
        ({"longest": [4, 64]}, r"data.longest=\[4, 64\] .* data.sequence_length=32 must rise"),
        ({"task": Needle(), "vocab_size": 49}, "from at least 13"),
        ({"curriculum_steps": -1}, "data.curriculum_steps=-1 must be 0 or more"),
        ({"global_batch_size": 7}, "data.global_batch_size=7 is not a multiple of 2"),
    ],
)
def test_mistakes(settings, complaint):
    with pytest.raises(UserError, match=complaint):
        module(**settings)


def test_needles_need_keys():
    with pytest.raises(UserError, match=r"data.task.keys=3 must be at least data.task.needles=4"):
        Needle(keys=3)
