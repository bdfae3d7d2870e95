"""Continuations: the model's own, from seeds, in batches as alone, ended by what ends them; public models too."""

from pathlib import Path

import pytest
import torch

from mamba3_train.checkpoint.official_mamba import load_official
from mamba3_train.errors import UserError
from mamba3_train.evaluation.generation import generate
from mamba3_train.evaluation.sampling import Sampling
from tests.small_run import make_config, make_model, tokenizer

GREEDY = Sampling(temperature=0)
PROMPTS = ["the state of", "a", "every token grows with every token"]
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def model():
    return make_model(make_config("M*")).double()  # so that rounding never decides a draw


def texts(generation):
    return [continuation.text for continuation in generation.continuations]


def tokens(generation):
    return [continuation.tokens for continuation in generation.continuations]


def test_greedy_takes_the_likeliest_token_of_the_whole_row(model):
    generation = generate(model, tokenizer(), PROMPTS, 6, sampling=GREEDY)
    for prompt, continuation in zip(PROMPTS, generation.continuations, strict=True):
        row = tokenizer().encode(prompt)
        for token in continuation.tokens:
            assert int(model(torch.tensor([row]))[0, -1, :270].argmax()) == token
            row.append(token)
        assert continuation.text == tokenizer().decode(row)[len(prompt) :]
        assert continuation.reason == "length"
    assert generation.prompt_tokens == sum(len(tokenizer().encode(prompt)) for prompt in PROMPTS)
    assert generation.tokens == 18


def test_a_batch_gives_each_prompt_what_it_gets_alone(model):
    together = tokens(generate(model, tokenizer(), PROMPTS, 12, seed=3))
    for number, prompt in enumerate(PROMPTS):
        assert tokens(generate(model, tokenizer(), [prompt], 12, seed=3 + number)) == [together[number]]


def test_the_seed_decides(model):
    first, again, other = (tokens(generate(model, tokenizer(), ["the state"] * 2, 8, seed=s)) for s in (1, 1, 2))
    assert first == again
    assert first != other
    assert first[0] != first[1], "the same prompt twice is drawn twice"
    assert first[1] == other[0]


def test_the_penalty_counts_the_prompt_and_what_followed(model):
    strong = Sampling(temperature=0, repetition_penalty=1e9)
    (drawn,) = tokens(generate(model, tokenizer(), ["the state"], 30, sampling=strong))
    assert len({*drawn, *tokenizer().encode("the state")}) == 30 + len({*tokenizer().encode("the state")})


def test_what_is_shown_is_the_text(model):
    shown = ["", "", ""]

    def on_text(row, piece):
        shown[row] += piece

    generation = generate(model, tokenizer(), PROMPTS, 12, seed=2, stop=["e"], on_text=on_text)
    assert shown == texts(generation)


def test_a_stop_string_ends_one_and_the_others_go_on(model):
    whole = generate(model, tokenizer(), PROMPTS, 12, seed=5)
    stop = next(piece for piece in whole.continuations[0].text[3:] if piece.isascii())
    ended = generate(model, tokenizer(), PROMPTS, 12, seed=5, stop=[stop])
    for before, after in zip(whole.continuations, ended.continuations, strict=True):
        assert after.text == before.text.partition(stop)[0]
        assert after.reason == ("stop" if stop in before.text else "length")
        assert after.tokens == before.tokens[: len(after.tokens)]
    assert ended.continuations[0].reason == "stop"


def test_the_end_of_a_document_ends(model):
    coder = tokenizer()
    expected = tokens(generate(model, coder, PROMPTS, 12, seed=5))
    end = expected[1][7]

    class Ends:
        encode, decode, backend, end_of_document_id = coder.encode, coder.decode, coder.backend, end

    generation = generate(model, Ends, PROMPTS, 12, seed=5)
    for row, continuation in zip(expected, generation.continuations, strict=True):
        length = row.index(end) + 1 if end in row else 12
        assert continuation.tokens == row[:length]
        assert continuation.reason == ("end_of_document" if end in row else "length")
        assert len(continuation.text) < len(coder.decode(continuation.tokens)) or end not in row


def test_padding_entries_of_the_vocabulary_are_never_drawn():
    model = make_model(make_config(vocab_size=262))
    model.embedding.weight.data[262:] = 100 * model.embedding.weight.data[:2]
    coder = tokenizer()

    class Small:
        decode, backend, end_of_document_id = coder.decode, coder.backend, 0

        @staticmethod
        def encode(text):
            return [1, 2]

    drawn = tokens(generate(model, Small, ["x"] * 24, 12, sampling=Sampling(temperature=5.0)))
    assert max(map(max, drawn)) < 262


@pytest.mark.parametrize("name", ["official_lm_siso", "official_lm_mimo_r4"])
def test_public_checkpoints_generate(name):
    model, coder = load_official(GOLDEN / name).double(), tokenizer()

    class Letters:
        """Their 203 entries read as the first ones of ours."""

        decode, backend, end_of_document_id = coder.decode, coder.backend, 0

        @staticmethod
        def encode(text):
            return [min(token, 202) for token in coder.encode(text)]

    (drawn,) = tokens(generate(model, Letters, ["Mamba"], 8, sampling=GREEDY))
    row = Letters.encode("Mamba")
    for token in drawn:
        assert int(model(torch.tensor([row]))[0, -1, :203].argmax()) == token
        row.append(token)


@pytest.mark.parametrize(
    ("prompts", "settings", "complaint"),
    [
        ([], {}, "there is no prompt"),
        (["a", ""], {}, "prompt 2 is empty"),
        (["a"], {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        (["a"], {"stop": [""]}, "an empty stop string"),
    ],
)
def test_what_cannot_be_continued_is_refused(model, prompts, settings, complaint):
    with pytest.raises(UserError, match=complaint):
        generate(model, tokenizer(), prompts, **{"max_new_tokens": 5} | settings)
