"""Loggers go on where they were, and their failures never reach training."""

import pytest

from mamba3_train.errors import UserError
from mamba3_train.training import loggers
from mamba3_train.training.loggers import Tolerant, tensorboard, wandb

ROW = {"step": 1, "train/loss": 2.0, "mfu": None}


class Recorder:
    def __init__(self, *failures):
        self.failures, self.rows = set(failures), []

    def log_metrics(self, metrics, step):
        if step in self.failures:
            raise OSError("the server is gone\nand here is why")
        self.rows.append(metrics)

    def finalize(self, status):
        raise OSError("gone")


def test_a_row_that_fails_is_a_warning_once_and_the_next_is_logged(caplog):
    inner = Recorder(2, 3)
    logger = Tolerant("it", lambda: inner)
    for step in (1, 2, 3, 4):
        logger.log_metrics(ROW | {"step": step}, step)
    logger.finalize("success")
    assert [row["step"] for row in inner.rows] == [1, 4]
    assert "mfu" not in inner.rows[0]
    assert caplog.text.count("logger it failed (the server is gone): training goes on") == 1
    assert len(caplog.records) == 1


def test_another_is_turned_to_only_before_anything_is_logged(caplog):
    online, offline = Recorder(1), Recorder(3)
    logger = Tolerant("it", lambda: online, lambda: offline)
    for step in (1, 2, 3):
        logger.log_metrics(ROW | {"step": step}, step)
    assert online.rows == []
    assert [row["step"] for row in offline.rows] == [1, 2]
    assert "does not work (the server is gone): offline instead" in caplog.text


def test_an_unreachable_server_means_offline_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch, caplog):
    """A server that refuses connections; then a second part of the run, offline from its start."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "online")
    for offline in (False, True):
        chosen = {"project": "p", "name": "n", "offline": offline}
        logger = wandb(folder=str(tmp_path), settings={"seed": 1}, **chosen)
        logger.log_metrics(ROW, 1)
        logger.finalize("success")
        finish()
    assert caplog.text.count("offline instead") == 1
    assert caplog.text.count("training goes on") == 0
    name = (tmp_path / "wandb-id.txt").read_text().strip()
    written = list((tmp_path / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert len(written) == 2


def finish():
    import wandb as library

    library.finish()
    library.teardown()


def test_tensorboard_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        tensorboard(folder="runs/x", settings={})
