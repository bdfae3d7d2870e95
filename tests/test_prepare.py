"""The command: key=value in, one line out, exit code 2 and no traceback when something is wrong."""

import sys

import pytest

from mamba3_train.data.preparation import Preparation
from mamba3_train.prepare import main


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run the command with arguments; (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["prepare", *arguments])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def test_make_and_verify(command, tmp_path):
    (tmp_path / "text.txt").write_text("State, angle and rank. " * 100)
    arguments = ("source.path=text.txt", "output=out", "tokenizer.train.vocab_size=270", "workers=1")
    code, output, _ = command(*arguments)
    assert code == 0
    assert "out: 1 documents" in output
    code, output, _ = command("verify=out")
    assert code == 0
    assert "every shard is as its manifest says" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt"]


def test_a_corpus_without_validation_is_said(command, tmp_path):
    (tmp_path / "text.txt").write_text("State, angle and rank. " * 100)
    arguments = ("source.path=text.txt", "tokenizer.train.vocab_size=270", "workers=1")
    said = "no document fell into the validation split (validation_fraction=0.005)"
    assert said in command("output=out", *arguments)[1]
    assert said not in command("output=none", *arguments, "validation_fraction=0")[1]


def test_an_interrupt_ends_it_without_a_traceback(command, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Preparation, "run", interrupted)
    code, _, errors = command("output=out", "source.path=text.txt", "tokenizer.train.vocab_size=270")
    assert (code, errors) == (130, "\ninterrupted; the same command goes on\n")


def test_show(command, tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        for number in range(20):
            (tmp_path / name / f"{number}.txt").write_text(f"The {name} source, text {number}. " * 5)
    command(
        "+sources.one.path=first",
        "+sources.two.path=second",
        "output=out",
        "tokenizer.train.vocab_size=300",
        "workers=1",
    )
    code, output, _ = command("show=out", "rows=2", "sequence_length=64")
    assert code == 0
    assert all(word in output for word in ("one", "two", "train", "source, text", "document begins"))
    assert output.count("row ") == 2
    assert (tmp_path / "out" / "document_lengths.png").read_bytes().startswith(b"\x89PNG")


def test_plan(command, tmp_path):
    (tmp_path / "text.txt").write_text("State, angle and rank. " * 100)
    command("source.path=text.txt", "output=out", "tokenizer.train.vocab_size=270", "workers=1")
    code, output, _ = command("plan=out", "sequence_length=64")
    assert code == 0
    assert "rows of 64 tokens are planned" in output
    assert (tmp_path / "out" / "best_fit-64" / "plans.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["output=DIR", "verify=DIR"]),
        (["output=out", "verify=out"], ["exactly one"]),
        (["output=out"], ["source.path=PATH"]),
        (["output=out", "source.path=x", "tokenizer.train.vocab_size=300", "shard_tokens=0"], ["shard_tokens=0 must"]),
        (["output=out", "source.path=x", "tokenizer.train.vocab_size=300", "workers=-1"], ["workers=-1 must be"]),
        (["plan=out", "sequence_length=0"], ["sequence_length=0 must be at least 1"]),
        (["verify=nowhere"], ["no prepared corpus at nowhere"]),
        (["show=s3://bucket/corpus"], ["show=s3://bucket/corpus", "folder of this machine"]),
        (["output=out", "source.path=empty.jsonl", "tokenizer.train.vocab_size=300"], ["empty.jsonl", "it is empty"]),
        (["output=out", "source.path=code", "tokenizer.train.vocab_size=300"], ["code/a.png is no text in UTF-8"]),
        (["output=out", "source.pth=x"], ["source.pth"]),
        (["output=out", "source.path=missing", "tokenizer.train.vocab_size=300"], ["source.path=missing"]),
    ],
)
def test_mistakes(command, tmp_path, arguments, words):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / "code" / "a.py").write_text("print(1)")
    code, _, errors = command(*arguments)
    assert code == 2
    assert "Traceback" not in errors
    assert all(word in errors.strip().splitlines()[-1] for word in words)
    assert not list(tmp_path.rglob("manifest.json"))


def test_corrupt_shard_is_named(command, tmp_path):
    (tmp_path / "text.txt").write_text("State, angle and rank. " * 100)
    command("source.path=text.txt", "output=out", "tokenizer.train.vocab_size=270", "workers=1")
    shard = next((tmp_path / "out").glob("*.bin"))
    shard.write_bytes(b"\0" + shard.read_bytes()[1:])
    code, _, errors = command("verify=out")
    assert code == 2
    assert shard.name in errors
