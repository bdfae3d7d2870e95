"""The harness on a task made here: its numbers are those computed by hand."""

import functools
import json
import math
import os

import pytest
import torch

from mamba3_train.errors import UserError
from mamba3_train.evaluation import lm_harness
from mamba3_train.evaluation.lm_harness import HarnessModel, dealt_out, evaluate_tasks, in_batches, load_tasks
from tests.small_run import make_config, make_model, tokenizer

WORDS = ("state", "model", "token", "value")
DOCUMENTS = [
    {"question": "the" + " state of a recurrent" * length, "choices": list(WORDS), "answer": length % 4}
    for length in (0, 5, 1, 2, 9)
]


@pytest.fixture(scope="module", autouse=True)
def _offline(tmp_path_factory):
    """Nothing is fetched; what the data sets library caches stays in a folder of the test."""
    changed = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path_factory.mktemp("hub"))}
    before = {key: os.environ.get(key) for key in changed}
    os.environ.update(changed)
    yield
    for key, value in before.items():
        os.environ.pop(key) if value is None else os.environ.update({key: value})


@pytest.fixture(scope="module")
def model():
    return make_model(make_config("MM*"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with three tasks: choosing, the text's own likelihood, generating."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/documents.jsonl"}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
    choosing = 'output_type: multiple_choice\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
    choosing += "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    (folder / "choosing.yaml").write_text("task: choosing" + common + choosing)
    rolling = 'output_type: loglikelihood_rolling\ndoc_to_target: "{{question}}"\n'
    rolling += "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n"
    (folder / "rolling.yaml").write_text("task: rolling" + common.replace("{{question}}", "") + rolling)
    generating = 'output_type: generate_until\ndoc_to_target: "echo"\nmetric_list: [{metric: exact_match}]\n'
    generating += 'generation_kwargs: {until: ["."], max_gen_toks: 7}\n'
    (folder / "generating.yaml").write_text("task: generating" + common + generating)
    return folder


def run_tasks(model, tasks, include_path, limit=None):
    return evaluate_tasks(model, load_tasks(tasks, include_path=include_path), limit=limit)


def harness(model, **settings):
    defaults = {"max_length": 512, "tokens_per_batch": 128}
    return HarnessModel(model, tokenizer(), torch.device("cpu"), **(defaults | settings))


def log_likelihood(model, context, continuation):
    """Token by token: a pass of its own for each."""
    total, greedy = 0.0, True
    for i, token in enumerate(continuation):
        with torch.no_grad():
            logits = model(torch.tensor([context + continuation[:i]]))[0, -1, : tokenizer().vocab_size]
        total += float(logits.log_softmax(-1)[token])
        greedy &= int(logits.argmax()) == token
    return total, greedy


def encode_pair(document, choice):
    whole = tokenizer().encode(f"{document['question']} {choice}")
    context = tokenizer().encode(document["question"])
    assert whole[: len(context)] == context
    return context, whole[len(context) :]


def test_choices_are_scored_as_by_hand(model, tasks):
    right = right_norm = 0
    for document in DOCUMENTS:
        scores = [log_likelihood(model, *encode_pair(document, choice))[0] for choice in WORDS]
        right += max(range(4), key=lambda i: scores[i]) == document["answer"]
        norm = [score / len(choice) for score, choice in zip(scores, WORDS, strict=True)]
        right_norm += max(range(4), key=lambda i: norm[i]) == document["answer"]
    found = run_tasks(harness(model), ["choosing"], include_path=tasks)["choosing"]
    assert found["acc"] == pytest.approx(right / 5)
    assert found["acc_norm"] == pytest.approx(right_norm / 5)


@pytest.mark.parametrize("tokens_per_batch", [1, 60, 10_000])
def test_likelihoods_are_those_by_hand_in_any_batches(model, tokens_per_batch):
    pairs = [encode_pair(document, choice) for document in DOCUMENTS for choice in WORDS[:2]]
    greedy = encode_pair(DOCUMENTS[0], WORDS[0])[0]
    for _ in range(3):  # a continuation that is the likeliest one
        with torch.no_grad():
            greedy = [*greedy, int(model(torch.tensor([greedy]))[0, -1, : tokenizer().vocab_size].argmax())]
    pairs.append((greedy[:-3], greedy[-3:]))
    found = harness(model, tokens_per_batch=tokens_per_batch)._loglikelihood_tokens([(None, *pair) for pair in pairs])
    for pair, (value, is_greedy) in zip(pairs, found, strict=True):
        expected = log_likelihood(model, *pair)
        assert value == pytest.approx(expected[0], rel=1e-4)
        assert is_greedy == expected[1]
    assert found[-1][1]


def test_whole_texts_and_their_windows(model, tasks):
    found = run_tasks(harness(model), ["rolling"], include_path=tasks)["rolling"]
    end = tokenizer().end_of_document_id
    texts = [document["question"] for document in DOCUMENTS]
    nats = -sum(log_likelihood(model, [end], tokenizer().encode(text))[0] for text in texts)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / sum(map(len, texts)), rel=1e-4)
    assert found["word_perplexity"] == pytest.approx(math.exp(nats / sum(len(t.split()) for t in texts)), rel=1e-4)
    # In windows of 8 tokens: the first begins at the end-of-document token, later ones overlap by their context.
    ids = tokenizer().encode(texts[-1])
    windows = [([end], ids[:8])]
    for begin in range(8, len(ids), 8):
        stop = min(begin + 8, len(ids))
        windows.append((ids[max(stop - 9, 0) : begin], ids[begin:stop]))
    expected = sum(log_likelihood(model, *window)[0] for window in windows)

    class Request:
        args = (texts[-1],)

    assert harness(model, max_length=8).loglikelihood_rolling([Request])[0] == pytest.approx(expected, rel=1e-4)


def test_generation_is_told_where_to_stop(model, tasks):
    calls = []

    def generate(prompts, most, stop, temperature):
        calls.append((prompts, most, stop, temperature))
        return ["echo" if prompt == "the" else "other" for prompt in prompts]

    found = run_tasks(harness(model, generate=generate), ["generating"], include_path=tasks)["generating"]
    assert found["exact_match"] == pytest.approx(1 / 5)
    ((prompts, most, stop, temperature),) = calls
    assert sorted(prompts) == sorted(document["question"] for document in DOCUMENTS)
    assert (most, stop, temperature) == (7, ["."], 0.0)
    with pytest.raises(UserError, match="tasks that generate text cannot be evaluated here"):
        run_tasks(harness(model), ["generating"], include_path=tasks)


def test_limit_and_unknown_tasks(model, tasks, monkeypatch):
    found = run_tasks(harness(model), ["choosing"], include_path=tasks, limit=2)["choosing"]
    assert found["acc"] in (0.0, 0.5, 1.0)
    # Without the harness's own thousands, which take seconds to read.
    own = functools.partial(lm_harness.TaskManager, include_path=str(tasks), include_defaults=False)
    monkeypatch.setattr(lm_harness, "TaskManager", lambda **_: own())
    with pytest.raises(UserError, match="has no task chosing"):
        run_tasks(harness(model), ["chosing"], include_path=tasks)


def test_data_that_cannot_be_had(model, tmp_path):
    (tmp_path / "gone.yaml").write_text(
        f'task: gone\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: "{tmp_path}/gone.jsonl"}}}}\n'
        "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: text\n"
    )
    with pytest.raises(UserError, match="the data of gone cannot be had"):
        run_tasks(harness(model), ["gone"], include_path=tmp_path)


def test_batches_hold_every_row_once_and_no_more_than_they_may():
    lengths = [5, 90, 1, 40, 40, 200, 7, 33]
    batches = in_batches(lengths, 100)
    assert sorted(number for batch in batches for number in batch) == list(range(8))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[n] for n in batch) <= 100
    assert batches[0] == [5], "the longest first: what does not fit the memory shows at once"


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_ranks_make_as_many_passes_and_leave_nothing_out(ranks, monkeypatch):
    batches = [[0], [1], [2], [3], [4]]
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr(lm_harness, "_rank", lambda rank=rank: rank)
        monkeypatch.setattr(lm_harness, "_ranks", lambda: ranks)
        shares.append(dealt_out(batches))
    assert {len(share) for share in shares} == {-(-5 // ranks)}
    assert {batch[0] for share in shares for batch in share} == {0, 1, 2, 3, 4}
