"""The command that generates: as a user runs it, and what it refuses."""

import io
import json
import os
import subprocess
import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from mamba3_train import generate
from mamba3_train.config import verbatim
from mamba3_train.errors import UserError
from tests.small_run import make_config, make_model, write_run

HARD = "it's \"x\", (a) {b: c} [d] = ${run} \\${run} \\' #! \n\ttab \\\\"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "small", make_model(make_config("M*")))


@pytest.fixture
def run(monkeypatch, capfd, folder):
    """Call the command on the CPU; returns exit code, output and errors."""

    def call(*arguments, of=folder):
        monkeypatch.setattr(sys, "argv", ["mamba3_train.generate", f"run={of}", "device=cpu", *arguments])
        try:
            generate.main()
        except SystemExit as stop:
            return stop.code, *capfd.readouterr()
        return 0, *capfd.readouterr()

    return call


def test_the_command_in_a_process_of_its_own(folder, tmp_path):
    """A prompt that Hydra's grammar would not take, streamed; what it went on with is also in the file."""
    command = [sys.executable, "-m", "mamba3_train.generate", f"run={folder}", "max_new_tokens=8", f"prompt={HARD}"]
    output = tmp_path / "new" / "results.jsonl"
    result = subprocess.run(
        [*command, f"output={output}", "device=cpu", "seed=4"],
        cwd=tmp_path, env=os.environ, capture_output=True, check=False, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (row,) = map(json.loads, output.read_text().splitlines())
    assert row["prompt"] == HARD
    assert len(row["tokens"]) == 8
    assert result.stdout.decode() == HARD + row["text"] + "\n"
    assert "step 7: " in result.stderr.decode()
    assert "8 tokens in " in result.stderr.decode()
    assert "tokens/s" in result.stderr.decode()


@pytest.mark.parametrize("text", [HARD, "", "'", "\\", "\\'", "a\\\\", "$", "${", "null", "[1, 2]", "true", " x "])
def test_any_text_survives_the_command_line(text):
    override = OverridesParser.create().parse_override(verbatim(f"prompt={text}", ["prompt"]))
    value = OmegaConf.create({"prompt": override.value()}).prompt
    assert value == (None if text == "null" else text)


def test_other_arguments_are_left_alone():
    assert verbatim("stop=[a,b]", ["prompt"]) == "stop=[a,b]"
    assert verbatim("--help", ["prompt"]) == "--help"


def test_prompts_of_a_file_in_batches_are_as_alone(run, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("the state\n\na token of\nkeys\n")
    (tmp_path / "prompts.jsonl").write_text('"the state"\n{"prompt": "a token of"}\n"keys"\n')
    common = ["max_new_tokens=6", "dtype=float64", "top_k=50", "seed=9"]

    def results(*arguments):
        code, out, errors = run(*common, f"output={tmp_path}/out.jsonl", *arguments)
        assert code == 0, errors
        return out, [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]

    out, together = results(f"prompts={tmp_path}/prompts.txt", "samples=2")
    assert [row["prompt"] for row in together] == ["the state"] * 2 + ["a token of"] * 2 + ["keys"] * 2
    assert all(row["prompt"] + row["text"] in out for row in together)
    assert results(f"prompts={tmp_path}/prompts.jsonl", "samples=2", "batch_size=4")[1] == together
    monkeypatch.setattr(sys, "stdin", io.StringIO("keys\n"))
    assert results("prompts=-", "seed=14")[1] == together[5:]


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, []), ("a", ["a"]), (["a", "\\n\\n"], ["a", "\n\n"]), ([3], ["3"])],
)
def test_stop_strings(given, expected):
    assert generate.stop_strings(OmegaConf.create(given) if isinstance(given, list) else given) == expected


@pytest.mark.parametrize(
    ("prompt", "content", "complaint"),
    [
        ("a", "b", "give either prompt=TEXT or prompts=FILE"),
        (None, None, "cannot be read"),
        (None, "\n \n", "holds no prompt"),
        (None, '"a"\n[1]', r'\[1\] is neither a JSON text nor an object with "prompt"'),
        (None, "plain", "plain is neither"),
    ],
)
def test_files_without_prompts_are_refused(prompt, content, complaint, tmp_path):
    file = tmp_path / "prompts.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=complaint):
        generate.read_prompts(prompt, str(file))


def test_an_interrupt_ends_it_without_a_traceback(run, monkeypatch):
    def interrupted(*arguments):
        yield
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "generations", interrupted)
    code, out, errors = run("prompt=a")
    assert (code, out) == (130, "\n")
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "give either prompt=TEXT or prompts=FILE"),
        (["prompt="], "prompt 1 is empty"),
        (["prompt=a", "max_new_tokens=0"], "max_new_tokens=0 must be at least 1"),
        (["prompt=a", "state_dtype=float16"], "state_dtype=float16 must be auto, float32 or bfloat16"),
        (["prompt=a", "batch_size=0"], "batch_size=0"),
        (["prompt=a", "top_p=2"], "top_p=2.0 must be between"),
        (["prompt=a", "top_p=much"], "top_p"),
        (["prompt=a", "step=8"], "no checkpoint of step 8; it has those of 7"),
        (["prompt=a", "dtype=int8"], "dtype=int8 must be auto or one of"),
        (["prompt=a", "temprature=1"], "unknown key temprature. Did you mean temperature"),
        (["prompt=a", "output=/dev/null/x"], "output=/dev/null/x cannot be written"),
        (["prompt=a", "kernels=fast"], "no kernels named 'fast'"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(arguments, complaint, run):
    code, _, errors = run(*arguments)
    assert code == 2
    assert complaint in errors
    assert len([line for line in errors.strip().splitlines() if line.startswith("error: ")]) == 1
    assert "Traceback" not in errors


def test_a_folder_without_a_model_gets_one_line(run, tmp_path):
    code, out, errors = run("prompt=a", of=tmp_path)
    assert (code, out) == (2, "")
    assert errors == (
        f"error: {tmp_path} holds neither a config.yaml nor a config.json: give the folder of a run or of a "
        "checkpoint, an exported folder, or a public checkpoint\n"
    )
