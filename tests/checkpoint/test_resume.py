"""A run folder goes on with the run that it holds, and with no other."""

import datetime
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from mamba3_train.checkpoint import resume
from mamba3_train.checkpoint.resume import open_run_folder
from mamba3_train.config import compose
from mamba3_train.errors import UserError
from mamba3_train.training import processes

DATA = {"documents": {"tokenizer.json": "{}"}, "corpus": "12"}


@pytest.fixture
def config(tmp_path):
    return lambda *overrides: compose("+recipe=quickstart", f"run.dir={tmp_path}/run", *overrides)


@pytest.mark.parametrize(
    "change",
    ["data.shuffle_shards=1", "data.seed=9", "data.sequence_length=8", "data.global_batch_size=64", "run.seed=9",
     "data.packing=best_fit", "model.n_layers=1", "optimizer.lr=1", "data.path=elsewhere"],
)  # fmt: skip
def test_what_decides_the_run_may_not_change(change, config):
    open_run_folder(config(), **DATA)
    with pytest.raises(UserError, match=change.split("=")[0]):
        open_run_folder(config(change), **DATA)


@pytest.mark.parametrize("change", ["trainer.max_steps=9", "data.micro_batch_size=1", "data.num_workers=0"])
def test_what_does_not_may(change, config, tmp_path):
    open_run_folder(config(), **DATA)
    assert open_run_folder(config(change), **DATA) is None
    saved, (key, value) = OmegaConf.load(tmp_path / "run" / "config.yaml"), change.split("=")
    assert OmegaConf.select(saved, key) == int(value), "the folder tells how the run goes on"


def test_another_corpus_at_the_same_path_is_refused_and_nothing_touched(config, tmp_path):
    open_run_folder(config(), **DATA)
    before = {path: path.read_text() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError, match=r"holds a run of another corpus than data.path has now \(.*corpus.json\)"):
        open_run_folder(config(), {"tokenizer.json": "other"}, "13")
    assert {path: path.read_text() for path in (tmp_path / "run").iterdir()} == before


def test_the_tokenizer_may_be_written_otherwise_by_another_version(config, tmp_path):
    open_run_folder(config(), **DATA)
    open_run_folder(config(), {"tokenizer.json": "{ }"}, "12")
    assert (tmp_path / "run" / "tokenizer.json").read_text() == "{ }"


def test_a_run_from_before_corpora_were_told_apart_goes_on(config, tmp_path):
    open_run_folder(config(), DATA["documents"])
    open_run_folder(config(), **DATA)
    assert (tmp_path / "run" / "corpus.json").read_text() == '{"sha256": "12"}\n'


def test_a_complete_run_that_lost_its_checkpoints_does_not_begin_again(config, tmp_path):
    open_run_folder(config(), **DATA)
    (tmp_path / "run" / "summary.json").write_text("{}")
    with pytest.raises(UserError, match=r"a complete run without its checkpoints: bring .*checkpoints back"):
        open_run_folder(config(), **DATA)


HOLD = """
import sys, time
from pathlib import Path
from mamba3_train.checkpoint import resume
resume._take(Path(sys.argv[1]))
print("taken", flush=True)
time.sleep(60)
"""


def test_what_another_process_left_meanwhile_is_looked_at(config, tmp_path, monkeypatch):
    def take(folder):
        (folder / "config.yaml").write_text("run:\n  seed: 9\n")

    monkeypatch.setattr(resume, "_take", take)
    with pytest.raises(UserError, match="holds a run of another config"):
        open_run_folder(config(), **DATA)


def test_two_processes_do_not_train_in_one_folder(config, tmp_path, monkeypatch):
    """Until the other one ends, however it does."""
    (tmp_path / "run").mkdir()
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "taken\n"
        monkeypatch.setattr(resume, "PATIENCE", 0)
        with pytest.raises(UserError, match="another process is training in"):
            open_run_folder(config(), **DATA)
    finally:
        other.kill()
        other.communicate()
    monkeypatch.setattr(resume, "PATIENCE", 9)
    assert open_run_folder(config(), **DATA) is None
    assert open_run_folder(config(), **DATA) is None, "it is this process's already"


def test_groups_over_the_cpu_are_as_patient_as_the_watchdog(monkeypatch):
    asked = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(processes, "_timeout", processes.TIMEOUT)
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: bool(asked))
    monkeypatch.setattr(processes.dist, "init_process_group", lambda *_, timeout: asked.append(timeout))
    monkeypatch.setattr(processes.dist, "new_group", lambda *_, timeout, **__: asked.append(timeout))
    processes.join(on_gpu=False, watchdog_seconds=3600)
    processes.SharedFlag()
    assert asked == 2 * [datetime.timedelta(seconds=3 * 3600 + 60)]
