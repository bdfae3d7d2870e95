"""The command: perplexity of every source, public checkpoints, and what it refuses."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from mamba3_train import evaluate
from mamba3_train.checkpoint.official_mamba import load_official
from mamba3_train.data import Preparation
from mamba3_train.data.token_shards import TokenSplit, read_manifest
from mamba3_train.evaluation.paper_results import ROWS, TASKS, rows_of_size
from mamba3_train.evaluation.results_table import paper_table
from tests.small_run import TEXT, make_config, make_model, tokenizer, write_run

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def run(monkeypatch, capfd):
    """Call the command; returns exit code, output and errors."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["mamba3_train.evaluate", *arguments])
        try:
            evaluate.main()
        except SystemExit as stop:
            return stop.code, *capfd.readouterr()
        return 0, *capfd.readouterr()

    return call


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two sources, half of their documents for validation."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "tokenizer.json").write_text(tokenizer().backend.to_str())
    sources = {}
    for name, words in (("prose", TEXT.split()), ("shout", TEXT.upper().split())):
        lines = [json.dumps({"text": " ".join(words[i % 7 : i % 7 + 9]) + f" {i}"}) for i in range(60)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        sources[name] = {"path": str(folder / f"{name}.jsonl")}
    preparation = Preparation(
        sources=sources, tokenizer={"file": str(folder / "tokenizer.json")}, validation_fraction=0.5, workers=1
    )
    preparation.run(folder / "prepared")
    return folder / "prepared"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    """A run of a small model on the corpus, and the model."""
    model = make_model(make_config("M"))
    folder = tmp_path_factory.mktemp("run") / "run"
    return write_run(folder, model, path=str(corpus), sequence_length=32), model.requires_grad_(False)


@torch.no_grad()
def by_hand(model, corpus, source, length, rows=10**9):
    """Nats, targets and bytes of the first rows of `length` inputs, cut from the documents laid end to end."""
    split = TokenSplit(corpus, read_manifest(corpus), "validation", source)
    tokens = np.concatenate([split.shard(i)[0] for i in range(len(split.shards))]).astype(np.int64)
    starts = set(np.concatenate([split.shard(i)[1] + split.starts[i] for i in range(len(split.shards))]).tolist())
    nats, targets, size = 0.0, 0, 0
    for first in range(0, min((len(tokens) - 1) // length, rows) * length, length):
        row = torch.from_numpy(tokens[first : first + length + 1])
        documents = torch.tensor([first + i in starts and i > 0 for i in range(length)]).cumsum(0)
        log_probabilities = model(row[None, :-1], documents[None].int())[0].log_softmax(-1)
        for i in range(length):
            if first + i + 1 not in starts:
                nats -= float(log_probabilities[i, row[i + 1]])
                targets += 1
                token = tokenizer().backend.id_to_token(int(row[i + 1]))
                size += 0 if token in (None, tokenizer().end_of_document) else len(token)
    return nats, targets, size


def test_perplexity_of_every_source(trained, corpus, run):
    folder, model = trained
    code, out, _ = run(f"run={folder}", "tokens_per_batch=100")
    assert code == 0
    results = json.loads((folder / "evaluation-step-00000007.json").read_text())
    assert (results["step"], results["parameters"]) == (7, sum(p.numel() for p in model.parameters()))
    assert list(results["perplexity"]) == ["prose", "shout", "all"]
    sums = np.zeros(3)
    for source in ("prose", "shout"):
        nats, targets, size = by_hand(model, corpus, source, 32)
        sums += nats, targets, size
        found = results["perplexity"][source]
        assert (found["tokens"], found["bytes"]) == (targets, size)
        assert found["perplexity"] == pytest.approx(math.exp(nats / targets), rel=1e-4)
        assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)
        assert f"{found['bits_per_byte']:.4f}" in out
    assert results["perplexity"]["all"]["loss"] == pytest.approx(sums[0] / sums[1], rel=1e-4)


def test_other_figures_do_not_take_the_place_of_the_first(trained, run):
    folder, _ = trained
    first = folder / "evaluation-step-00000007.json"
    assert run(f"run={folder}", "kernels=reference")[0] == 0
    before = first.read_text()
    assert run(f"run={folder}", "split=train", "rows=1", "sequence_length=16")[0] == 0
    assert first.read_text() == before
    assert json.loads(before)["measured_on"]["split"] == "validation"
    found = json.loads((folder / "evaluation-step-00000007-train-1-rows-16-sequence_length.json").read_text())
    assert found["measured_on"] == json.loads(before)["measured_on"] | {
        "split": "train", "rows": 1, "sequence_length": 16,
    }  # fmt: skip


def test_fewer_rows_and_another_length(trained, corpus, run, tmp_path):
    folder, _ = trained
    code, _, _ = run(f"run={folder}", "rows=1", "sequence_length=16", f"output={tmp_path}/deep/results.json")
    assert code == 0
    found = json.loads((tmp_path / "deep" / "results.json").read_text())["perplexity"]
    assert 0 < found["prose"]["tokens"] <= 16


@pytest.fixture(scope="module")
def words_corpus(tmp_path_factory):
    """A corpus of whole words, few enough for the public checkpoints made small."""
    folder = tmp_path_factory.mktemp("words")
    words = {word: number for number, word in enumerate(["</s>", *sorted(set(TEXT.split()))])}
    backend = Backend(models.WordLevel(words, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["</s>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": TEXT[:i]}) + "\n" for i in range(80, 160)))
    tokenizer = {"file": str(folder / "tokenizer.json")}
    source = {"path": str(folder / "texts.jsonl")}
    Preparation(source=source, tokenizer=tokenizer, validation_fraction=0.5, workers=1).run(folder / "prepared")
    return folder / "prepared"


@pytest.mark.parametrize("name", ["official_lm_siso", "official_lm_mimo_r4"])
def test_public_checkpoints(name, words_corpus, run, tmp_path):
    arguments = [f"run={GOLDEN / name}", f"corpus={words_corpus}", f"tokenizer={words_corpus}/tokenizer.json"]
    code, out, errors = run(*arguments, "sequence_length=32", "rows=6", f"output={tmp_path}/results.json")
    assert code == 0, errors
    results = json.loads((tmp_path / "results.json").read_text())
    ((source, found),) = results["perplexity"].items()
    assert (results["step"], found["bytes"], found["bits_per_byte"]) == (None, None, None)
    nats, targets, _ = by_hand(load_official(GOLDEN / name), words_corpus, source, 32, rows=6)
    assert found["tokens"] == targets
    assert found["perplexity"] == pytest.approx(math.exp(nats / targets), rel=1e-4)
    assert f"{found['perplexity']:.3f}" in out


def write_task(folder, texts):
    """A task `lines` of lm-evaluation-harness: the likelihood of texts."""
    (folder / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "lines.yaml").write_text(
        f'task: lines\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: "{folder}/lines.jsonl"}}}}\n'
        'test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list: [{metric: bits_per_byte}]\n"
    )


def test_harness_tasks_by_the_command(trained, run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    texts = [TEXT[10 * i :].strip()[: 20 + i] + "s" for i in range(4)]
    write_task(tmp_path, texts)
    folder, model = trained
    code, out, errors = run(f"run={folder}", "tasks=[lines]", f"include_path={tmp_path}", f"output={tmp_path}/r.json")
    assert code == 0, errors
    found = json.loads((tmp_path / "r.json").read_text())["tasks"]["lines"]["bits_per_byte"]
    nats = 0.0
    for text in texts:
        ids = torch.tensor([tokenizer().end_of_document_id, *tokenizer().encode(text)])
        logits = model(ids[None, :-1])[0, :, : tokenizer().vocab_size]  # without what pads the vocabulary
        nats -= float(logits.log_softmax(-1).gather(1, ids[1:, None]).sum())
    assert found == pytest.approx(nats / math.log(2) / sum(map(len, texts)), rel=1e-4)
    assert "bits_per_byte" in out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["run={run}", "tasks=[]"], "tasks=[] asks for nothing"),
        (["run={run}", "rows=0"], "rows=0 must be at least 1"),
        (["run={run}", "split=test"], "has no tokens in split=test: its splits are train, validation"),
        (["run={run}", "corpus=nowhere"], "no prepared corpus at nowhere"),
        (["run=nowhere"], "nowhere"),
        (["run={golden}", "tokenizer={words}/tokenizer.json"], "names no corpus: give a prepared one by corpus=DIR"),
        (["run={golden}"], "holds no tokenizer"),
        (["run={run}", "output=/dev/null/x.json", "rows=1"], "cannot be written"),
        (["run={run}", "taks=[paper]"], "unknown key taks. Did you mean tasks"),
    ],
)
def test_mistakes_get_one_line(arguments, complaint, trained, words_corpus, run):
    places = {"run": trained[0], "golden": GOLDEN / "official_lm_siso", "words": words_corpus}
    code, _, errors = run(*(argument.format(**places) for argument in arguments))
    assert code == 2
    assert len(errors.strip().splitlines()) == 1, errors
    assert complaint in errors


def test_a_corpus_of_another_tokenizer_is_refused(trained, run, tmp_path):
    from mamba3_train.data.tokenizer import Tokenizer

    Tokenizer.train([TEXT], 265).save(tmp_path / "tokenizer.json")
    code, _, errors = run(f"run={trained[0]}", f"tokenizer={tmp_path}/tokenizer.json")
    assert code == 2
    assert "was prepared with another tokenizer" in errors


def test_two_processes_find_what_one_does(trained, tmp_path, run):
    folder, _ = trained
    write_task(tmp_path, [TEXT[i : i + 30 + i] for i in range(7)])
    both = [
        f"run={folder}",
        "tasks=[perplexity,lines]",
        f"include_path={tmp_path}",
        "tokens_per_batch=70",
        "device=cpu",
    ]
    assert run(*both, f"output={tmp_path}/one.json")[0] == 0
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "mamba3_train.evaluate", *both, f"output={tmp_path}/two.json", "devices=2"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)
    assert result.returncode == 0, result.stderr
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    for source, values in one["perplexity"].items():
        assert two["perplexity"][source] == pytest.approx(values, rel=1e-5)
    assert two["tasks"]["lines"] == pytest.approx(one["tasks"]["lines"], rel=1e-5)


def test_the_papers_table():
    """arXiv 2603.15569, table 3: averages as printed there."""
    averages = {("180M", "Mamba-3 SISO"): 43.4, ("440M", "Mamba-3 MIMO"): 51.0, ("880M", "Transformer"): 52.8}
    averages |= {("1.5B", "Mamba-3 MIMO"): 57.6, ("1.5B", "Mamba-2"): 55.7, ("880M", "Mamba-2"): 53.4}
    for row in ROWS:
        assert len(row.accuracies) == len(TASKS) == 7
        if (row.size, row.model) in averages:
            assert sum(row.accuracies) / 7 == pytest.approx(averages[row.size, row.model], abs=0.051)
    assert {row.size for row in rows_of_size(1_400_000_000)} == {"1.5B"}
    ours = {task: {metric: 0.25} for task, (_, metric) in TASKS.items()}
    drawn = paper_table(ours, "runs/x", 190_000_000)
    assert next(iter(drawn.columns[-1].cells)) == "25.0"
    theirs = [f"paper: 180M {model}" for model in ("Transformer", "Mamba-2", "Mamba-3 SISO", "Mamba-3 MIMO")]
    assert list(drawn.columns[0].cells)[1:] == theirs
