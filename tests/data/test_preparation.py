"""Preparing: every kind of source, the same corpus however often it is interrupted, and errors that say what to do."""

import errno
import gzip
import json
import multiprocessing
import os
import signal
from itertools import pairwise

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from mamba3_train.data import corpus_writer, preparation, tokenizing
from mamba3_train.data.preparation import Preparation
from mamba3_train.data.token_shards import TokenSplit, read_manifest
from mamba3_train.data.tokenizer import Tokenizer
from mamba3_train.data.verification import verify
from mamba3_train.errors import UserError


def prepare(source, output, **settings):
    defaults = {"tokenizer": {"train": {"vocab_size": 300}}, "workers": 1, "validation_fraction": 0.1}
    source = source if isinstance(source, dict) else {"path": str(source)}
    return Preparation(source=source, **(defaults | settings)).run(output)


def texts_of(folder) -> list[str]:
    """Every document of a corpus, decoded."""
    manifest = verify(folder)
    tokenizer = Tokenizer.of_corpus(folder, manifest.end_of_document_id)
    found = []
    for split in manifest.splits:
        data = TokenSplit(folder, manifest, split)
        for number in range(len(data.shards)):
            tokens, offsets = data.shard(number)
            found += [tokenizer.decode(tokens[a : b - 1]) for a, b in pairwise(offsets)]
    return found


@pytest.fixture
def source(tmp_path, make_documents):
    make_documents(tmp_path / "text.jsonl", 400)
    return tmp_path / "text.jsonl"


def test_every_document_arrives_once_and_unchanged(tmp_path, make_documents):
    texts = make_documents(tmp_path / "text.jsonl", 300)
    manifest = prepare(tmp_path / "text.jsonl", tmp_path / "out")
    assert sorted(texts_of(tmp_path / "out")) == sorted(texts)
    assert 10 < sum(shard.documents for shard in manifest.splits["validation"]) < 60


def write_as(kind, folder, texts):
    folder.mkdir()
    lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))
    if kind == "folder of code":
        for number, text in enumerate(texts):
            (folder / f"{number:03d}.py").write_text(text)
        (folder / ".hidden").write_text("not this")
    elif kind == "parquet":
        table = pyarrow.table({"id": range(len(texts)), "text": texts})
        pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=7)
    elif kind == "jsonl.gz":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    else:
        (folder / "a.txt").write_text(texts[0])


@pytest.mark.parametrize("kind", ["folder of code", "parquet", "jsonl.gz", "one text"])
def test_kinds_of_sources(tmp_path, kind):
    texts = [f"def f{i}(x):\n\treturn 'Ünï' * {i}\n\n" for i in range(40)]
    texts = texts[:1] if kind == "one text" else texts
    write_as(kind, tmp_path / "in", texts)
    prepare(tmp_path / "in", tmp_path / "out")
    assert sorted(texts_of(tmp_path / "out")) == sorted(texts)


def test_standard_library_is_capped_and_repeatable(tmp_path):
    source = {"path": "python_stdlib", "max_bytes": 200_000}
    first, second = prepare(source, tmp_path / "a"), prepare(source, tmp_path / "b")
    assert first == second
    assert any("def " in text and "self" in text for text in texts_of(tmp_path / "a"))


def test_number_of_workers_changes_nothing(tmp_path, source):
    settings = {"shard_tokens": 5000}
    assert prepare(source, tmp_path / "a", workers=1, **settings) == prepare(
        source, tmp_path / "b", workers=3, **settings
    )


def test_duplicates_and_lengths(tmp_path):
    texts = ["one two", "x", "one two", "three four five", "one two", "y" * 100]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = {"path": str(tmp_path / "a.jsonl"), "min_characters": 2, "max_characters": 99}
    prepare(source, tmp_path / "once")
    prepare(source, tmp_path / "all", deduplicate=False)
    assert sorted(texts_of(tmp_path / "once")) == ["one two", "three four five"]
    assert sorted(texts_of(tmp_path / "all")) == ["one two"] * 3 + ["three four five"]


def killed(function, *arguments) -> int:
    """Run a function in a process of its own and return the exit code."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join(60)
    return process.exitcode


KILLS = [
    (corpus_writer.CorpusWriter, "add", [1, 7, 19, 25]),
    (corpus_writer.CorpusWriter, "checkpoint", [1, 8]),
    (corpus_writer, "publish", [2, 9]),
    (os, "replace", [3, 21, 23, 25]),
    (corpus_writer, "write_manifest", [1]),
    (corpus_writer.shutil, "rmtree", [2]),
]


@pytest.mark.parametrize(("owner", "name", "calls"), KILLS, ids=[name for _, name, _ in KILLS])
def test_killed_and_started_again(tmp_path, source, monkeypatch, owner, name, calls):
    """SIGKILL at the n-th call of a function, several times over one preparation, changes no byte of the corpus."""
    monkeypatch.setattr(preparation, "PIECE_CHARACTERS", 4000)
    monkeypatch.setattr("mamba3_train.data.text_sources.ROWS_A_BATCH", 20)
    source.write_text(source.read_text() * 2)
    # Threads that trained a tokenizer in this process would not exist in the forked one.
    tokenizer = Tokenizer.train(["some text to begin with"], 300)
    tokenizer.save(tmp_path / "tokenizer.json")
    settings = {"shard_tokens": 3000, "checkpoint_seconds": 0, "tokenizer": {"file": str(tmp_path / "tokenizer.json")}}
    expected = prepare(source, tmp_path / "whole", **settings)
    assert len(expected.splits["train"]) > 5
    assert sum(shard.documents for shard in expected.shards()) == 400

    def run_until(call):
        count = 0
        original = getattr(owner, name)

        def counting(*args, **kwargs):
            nonlocal count
            count += 1
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, counting)
        prepare(source, tmp_path / "out", **settings)

    for call in calls:
        assert killed(run_until, call) == -signal.SIGKILL
    assert prepare(source, tmp_path / "out", **settings) == expected
    verify(tmp_path / "out")
    assert not (tmp_path / "out" / ".preparing").exists()


def test_going_on_does_not_start_over(tmp_path, source, monkeypatch):
    monkeypatch.setattr("mamba3_train.data.text_sources.ROWS_A_BATCH", 20)

    def stop_late(self, *arguments):
        if self.progress["text"]["documents"] >= 300:
            raise KeyboardInterrupt
        original(self, *arguments)

    original = corpus_writer.CorpusWriter.add
    with monkeypatch.context() as patch:
        patch.setattr(corpus_writer.CorpusWriter, "add", stop_late)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, tmp_path / "out", checkpoint_seconds=0)
    added = []
    monkeypatch.setattr(
        corpus_writer.CorpusWriter, "add", lambda self, name, batch: (added.append(batch), original(self, name, batch))
    )
    prepare(source, tmp_path / "out")
    assert sum(len(batch.lengths) for batch in added) == 100
    assert len(texts_of(tmp_path / "out")) == 400


def test_finished_corpus_is_left_alone(tmp_path, source):
    manifest = prepare(source, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir() if path.name != ".lock"}
    assert prepare(source, tmp_path / "out") == manifest
    assert before == {path: path.stat().st_mtime_ns for path in before}
    with pytest.raises(UserError, match="another shard_tokens"):
        prepare(source, tmp_path / "out", shard_tokens=77)


def test_full_disk(tmp_path, source, monkeypatch):
    def full(self, tokens, lengths):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(corpus_writer.ShardWriter, "_append", full)
        with pytest.raises(UserError, match="disk is full"):
            prepare(source, tmp_path / "out")
    prepare(source, tmp_path / "out")
    assert len(texts_of(tmp_path / "out")) == 400


def test_document_that_kills_its_worker_is_named(tmp_path, source, monkeypatch):
    monkeypatch.setattr("mamba3_train.data.text_sources.ROWS_A_BATCH", 20)
    original = tokenizing.tokenize

    def fragile(tokenizer, texts, dtype):
        if any(text.startswith("123 ") for text in texts):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(tokenizer, texts, dtype)

    monkeypatch.setattr(tokenizing, "tokenize", fragile)
    with pytest.raises(UserError, match=r"document 123 kills .* begins with '123 "):
        prepare(source, tmp_path / "out")


def test_worker_killed_from_outside_is_not_blamed_on_a_document(tmp_path, source, monkeypatch):
    original = tokenizing.tokenize

    def once(tokenizer, texts, dtype):
        if not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(tokenizer, texts, dtype)

    monkeypatch.setattr(tokenizing, "tokenize", once)
    with pytest.raises(UserError, match="killed from outside"):
        prepare(source, tmp_path / "out")
    prepare(source, tmp_path / "out")
    assert len(texts_of(tmp_path / "out")) == 400


def test_validation_is_chosen_by_text_alone(tmp_path, make_documents):
    """A document stays in its split when others come or go."""
    make_documents(tmp_path / "more.jsonl", 400)
    make_documents(tmp_path / "less.jsonl", 200)
    tokenizer = {"train": {"vocab_size": 300}}
    held_out = {}
    for name in ("more", "less"):
        prepare(tmp_path / f"{name}.jsonl", tmp_path / name, tokenizer=tokenizer)
        manifest = read_manifest(tmp_path / name)
        coder = Tokenizer.of_corpus(tmp_path / name, manifest.end_of_document_id)
        tokens, offsets = TokenSplit(tmp_path / name, manifest, "validation").shard(0)
        pieces = np.split(tokens, offsets[1:-1])
        held_out[name] = {coder.decode(piece[:-1]) for piece in pieces}
        tokenizer = {"file": str(tmp_path / "more")}
    assert held_out["less"] == {text for text in held_out["more"] if int(text.split()[0]) < 200}
    assert held_out["less"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"source": {"path": "/no/such/place"}}, ["source.path=/no/such/place"]),
        ({"source": {"path": "SOURCE", "text": "body"}}, ["source.text=body", "text"]),
        ({"source": {"path": "SOURCE", "txt": "x"}}, ["source.txt", "text"]),
        ({"source": None}, ["source.path=PATH"]),
        ({"tokenizer": {}}, ["exactly one", "tokenizer.name"]),
        ({"tokenizer": {"file": "/no/tokenizer.json"}}, ["/no/tokenizer.json"]),
        ({"tokenizer": {"train": {"vocab_size": 10}}}, ["vocab_size=10", "257"]),
        ({"tokenizer": {"train": {"vocab_size": 300}, "end_of_document": ""}, "validation_fraction": 2}, ["[0, 1)"]),
    ],
)
def test_mistakes_are_explained(tmp_path, source, settings, words):
    given = settings.pop("source", {"path": "SOURCE"}) or {}
    given = {key: str(source) if value == "SOURCE" else value for key, value in given.items()}
    with pytest.raises(UserError) as error:
        prepare(given, tmp_path / "out", **settings)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", '{"text": ""}\n'])
def test_empty_source(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError):
        prepare(tmp_path / "a.jsonl", tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_tokenizer_that_cannot_be_had(tmp_path, source, monkeypatch):
    monkeypatch.setattr(
        "tokenizers.Tokenizer.from_pretrained", lambda name: (_ for _ in ()).throw(OSError("no route to host"))
    )
    with pytest.raises(UserError, match=r"owner/tokens.*no route to host.*tokenizer\.file"):
        prepare(source, tmp_path / "out", tokenizer={"name": "owner/tokens"})
