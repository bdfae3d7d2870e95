"""Mistakes on the command line: one clear line, exit code 2, nothing written."""

import subprocess
import sys

import pytest

from mamba3_train.config import check_keys, compose
from mamba3_train.errors import UserError
from mamba3_train.kernels.scan import KEEPS
from mamba3_train.schema import Keep
from mamba3_train.train import cli
from mamba3_train.training import assembly

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
        (["trainer.max_steps=1"], "run.name is not set: give run.name=VALUE, or a recipe (+recipe=NAME) that sets it"),
        (["+recipe=180m_siso", "data=shards", "data.path=x"], "error: data.vocab_size is not set"),
        (["+recipe=quickstart", "trainerr.max_steps=3"], "unknown key trainerr.max_steps. Did you mean trainer"),
        (["+recipe=quickstart", "max_steps=3"], "unknown key max_steps. Did you mean trainer.max_steps?"),
        (["+recipe=quickstart", "trainer.gradient_clip_norm=0"], "trainer.gradient_clip_norm=0 must be above 0"),
        (["+recipe=quickstart", "optimizer.lr=-1"], "optimizer.lr=-1 must be a number, at least 0"),
        (["+recipe=quickstart", "optimizer.lr=abc"], "optimizer.lr=abc must be a number, at least 0"),
        (["+recipe=quickstart", "optimizer.lr=nan"], "optimizer.lr=nan must be a number, at least 0"),
        (["+recipe=quickstart", "optimizer.eps=-1"], "optimizer.eps=-1 must be"),
        (["+recipe=quickstart", "optimizer.weight_decay=-1"], "optimizer.weight_decay=-1 must be"),
        (["+recipe=quickstart", "optimizer.betas=[0.9]"], "optimizer.betas=[0.9] must be two numbers"),
        (["+recipe=quickstart", "optimizer.betas=[0.9,1.5]"], "optimizer.betas=[0.9, 1.5] must be two numbers"),
        (["+recipe=quickstart", "profile=[9000,9001]"], "profile=[9000, 9001] begins after trainer.max_steps="),
        (["+recipe=quickstart", "run.seed=-1"], "run.seed=-1 must be at least 0"),
        (["+recipe=quickstart", "trainer.log_every_n_steps=0"], "trainer.log_every_n_steps=0 must be at least 1"),
        (["+recipe=quickstart", "trainer.watchdog_seconds=-1"], "trainer.watchdog_seconds=-1.0 must be at least 0"),
        (["+recipe=quickstart", "data.num_workers=-1"], "data.num_workers=-1 must be at least 0"),
        (["+recipe=quickstart", "strategy=ddp", "trainer.devices=-1"], "trainer.devices=-1 must be at least 1"),
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


def test_kernels_that_cannot_run_are_refused_beforehand(monkeypatch):
    config = compose("+recipe=quickstart", "kernels=triton", "trainer.accelerator=cpu")
    monkeypatch.setattr(assembly, "INTERPRETED", False)
    with pytest.raises(UserError, match="kernels=triton needs a GPU"):
        assembly.check_numbers(config)
    monkeypatch.setattr(assembly, "INTERPRETED", True)
    assembly.check_numbers(config)


def test_a_mistake_in_a_recipe_of_ones_own_is_told_with_what_was_meant(run, tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "own.yaml").write_text("# @package _global_\ntrainer:\n  max_stepss: 3\n")
    (tmp_path / "recipe" / "broken.yaml").write_text("trainer: [\n")
    code, _, errors = run(f"--config-dir={tmp_path}", "+recipe=own")
    assert (code, errors.count("\n")) == (2, 1)
    assert "trainer.max_stepss. Did you mean max_steps" in errors
    code, _, errors = run(f"--config-dir={tmp_path}", "+recipe=broken")
    assert (code, errors.count("\n")) == (2, 1)
    assert "broken.yaml" in errors


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
