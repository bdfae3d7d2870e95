"""The command that exports: once in a process of its own, and what it refuses."""

import json
import os
import subprocess
import sys

import pytest

from mamba3_train import export
from mamba3_train.trained_model import open_trained_model
from tests.small_run import make_config, make_model, write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp("runs") / "small", make_model(make_config("M*")), steps=(3, 7))
    (run / "summary.json").write_text(json.dumps({"step": 7, "val/loss": 3.25}))
    return run


@pytest.fixture
def run(monkeypatch, capfd, folder, tmp_path):
    """Call the command; returns exit code, output and errors."""

    def call(*arguments, of=folder):
        monkeypatch.setattr(sys, "argv", ["mamba3_train.export", f"run={of}", f"output={tmp_path}/out", *arguments])
        try:
            export.main()
        except SystemExit as stop:
            return stop.code, *capfd.readouterr()
        return 0, *capfd.readouterr()

    return call


def test_the_command_in_a_process_of_its_own(folder, tmp_path):
    command = [sys.executable, "-m", "mamba3_train.export", f"run={folder}", "to=hf", f"output={tmp_path}/new/hf"]
    result = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{tmp_path}/new/hf: {folder}, step 7 as hf\n"
    files = {path.name: path for path in (tmp_path / "new" / "hf").iterdir()}
    assert set(files) == {
        "config.json", "generation_config.json", "mamba3_scan.py", "model.safetensors", "modeling_mamba3.py",
        "README.md", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert len({path.stat().st_mode for path in files.values()}) == 1, "weights can be read by whoever reads the rest"
    card = files["README.md"].read_text()
    for expected in ("# small", "MIMO, rank 2", "| steps | 7 |", "3.2500 nats a token", "from_pretrained"):
        assert expected in card


def test_a_step_and_every_target(run, tmp_path):
    code, out, _ = run("to=safetensors", "step=3", "dtype=bfloat16")
    assert code == 0
    assert "step 3 as safetensors" in out
    opened = open_trained_model(tmp_path / "out", device="cpu")
    assert opened.tokenizer is not None
    code, _, errors = run("to=mamba_ssm", f"output={tmp_path}/public")
    assert code == 2
    assert "has attention layers: the public format is saved without" in errors
    assert not (tmp_path / "public").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["to=onnx"], "to=onnx must be one of hf, mamba_ssm, safetensors"),
        (["dtype=float16"], "dtype=float16 must be one of float32, bfloat16"),
        (["to=mamba_ssm", "dtype=bfloat16"], "to=mamba_ssm is written in float32"),
        (["shard_gib=0"], "shard_gib=0.0 must be more than 0"),
        (["step=4"], "no checkpoint of step 4; it has those of 3, 7"),
        (["outptu=x"], "unknown key outptu. Did you mean output"),
        (["output=/dev/null"], "output=/dev/null is there already and not empty"),
        (["output=/dev/null/x"], "cannot be written"),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(arguments, complaint, run, tmp_path):
    code, _, errors = run(*arguments)
    assert code == 2
    assert len(errors.strip().splitlines()) == 1
    assert complaint in errors
    assert not list(tmp_path.iterdir())
