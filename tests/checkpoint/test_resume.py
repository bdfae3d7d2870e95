"""A run folder goes on with the run that it holds, and with no other."""

import datetime

import pytest

from mamba3_train.checkpoint.resume import open_run_folder
from mamba3_train.config import compose
from mamba3_train.errors import UserError
from mamba3_train.training import processes

DATA = {"corpus.json": '{"sha256": "12"}\n', "tokenizer.json": "{}"}


@pytest.fixture
def config(tmp_path):
    return lambda *overrides: compose("+recipe=quickstart", f"run.dir={tmp_path}/run", *overrides)


@pytest.mark.parametrize(
    "change",
    ["data.shuffle_shards=1", "data.seed=9", "data.sequence_length=8", "data.global_batch_size=64", "run.seed=9",
     "data.packing=best_fit", "model.n_layers=1", "optimizer.lr=1", "data.path=elsewhere"],
)  # fmt: skip
def test_what_decides_the_run_may_not_change(change, config):
    open_run_folder(config(), DATA)
    with pytest.raises(UserError, match=change.split("=")[0]):
        open_run_folder(config(change), DATA)


@pytest.mark.parametrize("change", ["trainer.max_steps=9", "data.micro_batch_size=1", "data.num_workers=0"])
def test_what_does_not_may(change, config):
    open_run_folder(config(), DATA)
    open_run_folder(config(change), DATA)


def test_another_corpus_at_the_same_path_is_refused_and_nothing_touched(config, tmp_path):
    open_run_folder(config(), DATA)
    with pytest.raises(UserError, match=r"holds a run of another corpus than data.path has now \(.*corpus.json\)"):
        open_run_folder(config(), dict.fromkeys(DATA, "other"))
    assert {name: (tmp_path / "run" / name).read_text() for name in DATA} == DATA


def test_the_tokenizer_may_be_written_otherwise_by_another_version(config, tmp_path):
    open_run_folder(config(), DATA)
    open_run_folder(config(), DATA | {"tokenizer.json": "{ }"})
    assert (tmp_path / "run" / "tokenizer.json").read_text() == "{ }"


def test_a_run_from_before_corpora_were_told_apart_goes_on(config, tmp_path):
    open_run_folder(config(), {"tokenizer.json": "{}"})
    open_run_folder(config(), DATA)
    assert (tmp_path / "run" / "corpus.json").read_text() == DATA["corpus.json"]


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
