"""Synthetic tasks: answers against brute force, and rows that depend on seed and index alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mamba3_train.data import SyntheticDataModule
from mamba3_train.data.packing import IGNORED_LABEL
from mamba3_train.data.synthetic_tasks import BracketedArithmetic, ModularArithmetic, Needle, Parity
from mamba3_train.errors import UserError

SYMBOLS = "01234+-*()"


def documents(task, lengths, count=40):
    rng = np.random.default_rng(1)
    for length in lengths:
        for _ in range(count):
            tokens, labels = task.document(rng, length)
            assert len(tokens) == len(labels)
            assert all(0 <= token < task.vocab_size for token in tokens)
            assert labels[-1] != IGNORED_LABEL, "the last token is asked for"
            yield length, tokens, labels


def test_parity_counts_ones():
    for length, tokens, labels in documents(Parity(), [1, 2, 7, 40]):
        assert len(tokens) == length
        assert labels == [sum(tokens[: i + 1]) % 2 for i in range(length)]


def test_arithmetic_is_pythons():
    for length, tokens, labels in documents(ModularArithmetic(5), [1, 2, 9, 41]):
        assert len(tokens) == (length - 1 if length % 2 == 0 else length)
        text = "".join(SYMBOLS[token] for token in tokens)
        for i, label in enumerate(labels):
            assert label == (IGNORED_LABEL if i % 2 else eval(text[: i + 1]) % 5), text


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


@pytest.mark.parametrize("length", [13, 20, 64])
def test_needles_are_found_by_looking(length):
    task = Needle(values=5, keys=6, noise=3, needles=4)
    assert task.shortest == 13
    for _, tokens, labels in documents(task, [length]):
        asked = tokens.index(task.question) + 1
        assert len(tokens) == length == asked + 4
        assert labels[:asked] == [IGNORED_LABEL] * asked
        assert len(set(tokens[asked:])) == 4, "every key once"
        for key, answer in zip(tokens[asked:], labels[asked:], strict=True):
            places = [i for i in range(asked) if tokens[i] == key]
            assert len(places) == 1
            assert tokens[places[0] + 1] == answer


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
