"""The command of sweeps: its mistakes, a sweep of two real trainings, a look at it."""

import json
import os
import shlex
import shutil
import sys

import pytest

from mamba3_train import sweep, train
from mamba3_train.config import shipped_folder

SMALL = [
    "data.prepare.automatic=false", "data.validation_sequences=8", "data.sequence_length=64", "model.d_model=64",
    "model.d_mlp=64", "model.n_layers=2", "model.mixer.head_dim=16", "model.mixer.d_state=8", "trainer.max_steps=6",
    "trainer.log_every_n_steps=1", "validation.every_n_steps=3", "report.sample_prompt=null",
]  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Call a command in an empty folder; returns exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, main=sweep.main):
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        try:
            main()
        except SystemExit as stop:
            return stop.code, *capfd.readouterr()
        return 0, *capfd.readouterr()

    return call


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["sweep=lrr"], "there is no sweep named 'lrr'. Did you mean lr?"),
        (["sweep.trails=3"], "unknown key sweep.trails. Did you mean trials"),
        (["+sweep.space.optimizer.epss={choice:[1]}"], "unknown key optimizer.epss. Did you mean eps?"),
        (["+sweep.space.schedule={choice:[wsdd]}"], "there is no schedule named 'wsdd'. Did you mean wsd?"),
        (["optimizer.lr=1e-3"], "optimizer.lr=1e-3 is given, but sweep.space searches optimizer.lr"),
        (["run.dir=runs/a"], "every trial has its own; sweep.dir=runs/quickstart-lr is the folder of all"),
        (["sweep.sampler=tpa"], "sweep.sampler=tpa must be one of random, grid, tpe"),
        (["sweep.pruner=mean"], "sweep.pruner=mean must be one of none, median, successive_halving"),
        (["sweep.trials=4"], "sweep.trials=4, but the grid has 9 points"),
        (["workers=0"], "workers=0 must be at least 1"),
        (["data.validation_sequences=0"], "data.validation_sequences=0 leaves nothing to validate on"),
        (["trainer.num_nodes=2"], "a trial trains on one machine"),
        (["show=nothing"], "nothing holds no sweep: there is no journal.log in it"),
        (
            ["sweep=lr_batch", "+sweep.space.trainer.max_steps={int:[1,2],points:2}"],
            "sweep.space searches trainer.max_steps, which sweep.equal_tokens sets",
        ),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_a_mistake_gets_one_line_before_anything_starts(arguments, complaint, run, tmp_path):
    code, _, errors = run("+recipe=quickstart", *arguments)
    assert code == 2
    assert errors.startswith("error: ")
    assert len(errors.strip().splitlines()) == 1
    assert complaint in errors
    assert list(tmp_path.iterdir()) == []


def test_a_corpus_without_validation_is_refused_before_anything_starts(run, tmp_path, quickstart_corpus):
    shutil.copytree(quickstart_corpus, tmp_path / "corpus")
    manifest = json.loads((tmp_path / "corpus" / "manifest.json").read_text())
    manifest["splits"]["validation"] = []
    (tmp_path / "corpus" / "manifest.json").write_text(json.dumps(manifest))
    code, _, errors = run("+recipe=quickstart", f"data.path={tmp_path}/corpus")
    assert (code, errors.count("\n")) == (2, 1)
    assert "corpus has no validation split: a sweep judges its trials by val/loss; prepare it with" in errors
    assert not (tmp_path / "runs").exists()


def test_without_optuna_one_line_says_what_to_install(run, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("mamba3_train.sweeping.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, _, errors = run("+recipe=quickstart")
    assert (code, errors) == (
        2,
        "error: sweeps need optuna, which is not installed: pip install 'mamba3-train[sweep]'\n",
    )


@pytest.mark.parametrize("name", sorted(path.stem for path in shipped_folder("conf/sweep").iterdir()))
def test_shipped_spaces_fit_a_recipe(name, run, monkeypatch):
    monkeypatch.setattr(sweep, "worker_environments", lambda config: [])
    monkeypatch.setattr("mamba3_train.sweeping.workers.Workers.run", lambda self: 0)
    code, _, errors = run("+recipe=quickstart", f"sweep={name}")
    assert (code, errors) == (0, "")


def test_gpus_are_shared_out(monkeypatch):
    import torch

    from mamba3_train.config import compose
    from mamba3_train.errors import UserError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7")

    def environments(*overrides):
        return sweep.worker_environments(compose("+recipe=440m_siso", *overrides, config_name="sweep"))

    shares = environments("workers=2", "trainer.devices=2")
    assert shares == [{"CUDA_VISIBLE_DEVICES": "2,3"}, {"CUDA_VISIBLE_DEVICES": "5,7"}]
    with pytest.raises(UserError, match=r"workers=3 of trainer.devices=2 each need 6 GPUs, but there are 4"):
        environments("workers=3", "trainer.devices=2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="without a launcher"):
        environments()


def test_two_real_trainings(run, tmp_path, quickstart_corpus, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    space = "sweep.space.optimizer.lr={log_uniform:[1e-7,1x],points:2}"
    arguments = ["+recipe=quickstart", *SMALL, f"data.path={quickstart_corpus}", "sweep.name=my sweep", space]
    arguments += ["workers=2"]
    code, out, errors = run(*arguments)
    assert code == 0, errors
    folder = tmp_path / "runs" / "my sweep"
    found = json.loads((folder / "results.json").read_text())
    assert [trial["state"] for trial in found["trials"]] == ["complete", "complete"]
    assert [trial["values"] for trial in found["trials"]] == [{"optimizer.lr": 1e-7}, {"optimizer.lr": 4e-3}]
    losses = [json.loads((folder / t["trial"] / "summary.json").read_text())["val/loss"] for t in found["trials"]]
    assert [trial["val/loss"] for trial in found["trials"]] == losses
    assert found["best"]["trial"] == "trial-0001", "a rate of 1e-7 learns nothing"
    assert [trial["validations"] for trial in found["trials"]] == [2, 2]
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    best = found["best"]["command"]
    for expected in ("trial-0000 starts: optimizer.lr=1e-07", "trial-0001 complete: val/loss", best):
        assert expected in out
    # A look at it tells the same; the same command trains nothing more.
    before = (folder / "journal.log").read_bytes()
    code, shown, _ = run("show=runs/my sweep")
    assert (code, best in shown) == (0, True)
    code, again, _ = run(*arguments)
    assert (code, "starts" in again) == (0, False)
    assert (folder / "journal.log").read_bytes() == before
    code, _, errors = run(*arguments, "model.d_mlp=32")
    assert code == 2
    assert "holds another sweep: model.d_mlp (64 there, 32 now)" in errors
    # The command of the best is training's own and has its values.
    python, dash, package, *values = shlex.split(best)
    assert (python, dash, package) == ("python", "-m", "mamba3_train")
    code, config, _ = run(*values, "--cfg", "job", main=train.cli)
    assert code == 0
    for line in ("lr: 0.004", "name: my sweep-best", "d_mlp: 64", f"path: {quickstart_corpus}"):
        assert line in config
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_where_every_trial_fails_the_error_is_said(run, tmp_path, monkeypatch):
    fails = [sys.executable, "-S", "-c", "import sys; sys.exit('error: no GPU today')"]
    monkeypatch.setattr("mamba3_train.sweeping.trial_command.program", lambda: fails)
    code, _, errors = run("+recipe=quickstart", "sweep.space.optimizer.lr.points=2")
    assert code == 1
    assert errors == "error: every trial failed; trial-0001: no GPU today\n"
    trials = json.loads((tmp_path / "runs/quickstart-lr/results.json").read_text())["trials"]
    assert [(trial["state"], trial["error"]) for trial in trials] == [("failed", "no GPU today")] * 2
