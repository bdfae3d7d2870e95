"""Mistakes on the command line: one clear line, exit code 2, nothing written."""

import subprocess
import sys

import pytest

from mamba3_train.config import check_keys, compose
from mamba3_train.errors import UserError
from mamba3_train.kernels.scan import KEEPS
from mamba3_train.schema import Keep
from mamba3_train.train import cli

COMMAND = [sys.executable, "-m", "mamba3_train"]


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Call the command in an empty folder; returns exit code, output and errors."""

    def call(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["mamba3_train", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli()
        return stop.value.code, *capfd.readouterr()

    return call


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["+recipe=1.5b_mino"], "no recipe named '1.5b_mino'. Did you mean 1.5b_mimo"),
        (["+recipe=quickstart", "trainer.max_step=3"], "unknown key trainer.max_step. Did you mean max_steps"),
        (["+recipe=quickstart", "model.d_modle=3"], "unknown key model.d_modle. Did you mean d_model"),
        (["+recipe=quickstart", "+model.d_modle=3"], "unknown key model.d_modle. Did you mean d_model"),
        (["+recipe=quickstart", "optimiser=adamw"], "unknown key optimiser. Did you mean optimizer"),
        (["+recipe=quickstart", "mixer=mino"], "no mixer named 'mino'. Did you mean mimo"),
        (["+recipe=quickstart", "trainer.max_steps=many"], "trainer.max_steps: "),
        (["+recipe=quickstart", "model.mixer.head_dim=33"], "model.mixer.head_dim=33"),
        (["+recipe=quickstart", "data.micro_batch_size=3"], "data.micro_batch_size=3"),
        (["+recipe=quickstart", "trainer.devices=2"], "trainer.devices=2"),
        (["+recipe=quickstart", "trainer.precision=bf16-true"], "trainer.precision=bf16-true must be one of"),
        (["+recipe=quickstart", "trainer.activation_checkpointing=some"], "must be one of none, selective, full"),
        (["+recipe=quickstart", "trainer.compile=true"], "trainer.compile=True must be one of never, gpu, always"),
        (["+recipe=quickstart", "trainer.accelerator=tpu"], "trainer.accelerator=tpu must be one of"),
        (["+recipe=quickstart", "resume=maybe"], "resume: "),
        (["+recipe=quickstart", "kernels.keep=all"], "kernels.keep: "),
        (["+recipe=180m_siso"], "no prepared corpus at data.path=data/fineweb_edu; make it by: python -m"),
        (["trainer.max_steps=1"], "run.name"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_one_clear_line_and_exit_code_2(arguments, complaint, run, tmp_path):
    code, _, errors = run(*arguments)
    assert code == 2
    lines = errors.strip().splitlines()
    assert len(lines) == 1, errors
    assert lines[0].startswith("error: ")
    assert complaint in lines[0]
    assert not (tmp_path / "runs").exists()


def test_a_mistake_ends_the_process_with_code_2(tmp_path):
    command = [*COMMAND, "+recipe=nothing"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: there is no recipe named 'nothing'. ")
    assert len(result.stderr.splitlines()) == 1


def test_help_names_recipes_and_keys(tmp_path):
    command = [*COMMAND, "--help"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0
    for expected in ("+recipe=NAME", "quickstart", "1.5b_mimo", "max_steps", "resume"):
        assert expected in result.stdout


def test_a_misspelt_key_deep_in_a_section_is_found():
    with pytest.raises(UserError, match=r"model\.mixer\.d_stat\b.*d_state"):
        compose("+recipe=quickstart", "+model.mixer.d_stat=3")


def test_check_keys_leaves_keyword_catchers_alone():
    from omegaconf import OmegaConf

    catches = OmegaConf.create({"_target_": "builtins.dict", "anything": 1})
    assert check_keys(catches) is None
    with pytest.raises(UserError, match="anything"):
        check_keys(OmegaConf.create({"_target_": "mamba3_train.model.MixerConfig", "anything": 1}))


def test_what_is_kept_is_called_the_same_here_and_in_the_scan():
    assert [choice.name for choice in Keep] == list(KEEPS)
