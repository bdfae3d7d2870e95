"""A disk that will be full is said to be, once, in time."""

import json
from collections import namedtuple
from types import SimpleNamespace

import pytest

from mamba3_train.checkpoint import folders
from mamba3_train.training.callbacks import DiskSpace, disk_space

GIB = 2**30
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """A disk whose free space and checkpoints a test sets, and the callback that looks at it."""
    checkpoints = tmp_path / "checkpoints"
    kept = SimpleNamespace(folder=checkpoints, keep_last=3, keep_every_n_steps=0, writing=False)
    state = SimpleNamespace(free=100.0, kept=kept)
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda _: Usage(0, 0, int(state.free * GIB)))
    callback = DiskSpace(every_n_steps=5, bytes_expected=2 * GIB, checkpointing=kept)
    trainer = SimpleNamespace(is_global_zero=True, global_step=0)

    def checkpoint(step, gib):
        folder = folders.step_folder(checkpoints, step)
        folder.mkdir(parents=True)
        (folder / folders.MANIFEST).write_text(json.dumps({"files": {"a": {"bytes": gib * GIB}}}))

    def row(free, step=5):
        state.free, trainer.global_step = free, step
        callback.on_train_batch_end(trainer, None, None, None, 0)

    state.start = lambda: callback.on_train_start(trainer, None)
    state.checkpoint, state.row = checkpoint, row
    return state


def test_at_the_start_room_for_all_that_stay_and_one_more_is_asked_for(disk, caplog):
    disk.free = 8.0
    disk.start()
    assert not caplog.records
    disk.free = 7.9
    disk.start()
    assert "checkpoints will need 8.00 GiB more (4 of 2.00): make room, or lower checkpoint.keep_last" in caplog.text
    assert "7.90 GiB free" in caplog.text


def test_each_is_said_once_and_again_after_there_was_room(disk, caplog):
    for step in (5, 10):
        disk.checkpoint(step, gib=3)
    # Two are there: one more stays, and the one after it is written before the oldest goes.
    disk.row(6.0)
    assert not caplog.records
    for free in (5.9, 5.0, 4.0):
        disk.row(free)
    assert [record.message.count("checkpoints will need 6.00 GiB") for record in caplog.records] == [1]
    disk.row(2.9)
    disk.row(2.8)
    assert "less than the 3.00 GiB of the next checkpoint" in caplog.records[-1].message
    assert len(caplog.records) == 2
    disk.row(50.0)
    disk.row(5.0)
    assert len(caplog.records) == 3


def test_it_looks_when_rows_are_logged_and_nothing_is_half_written(disk, caplog):
    disk.row(0.1, step=4)
    disk.kept.writing = True
    disk.row(0.1)
    assert not caplog.records
    disk.kept.writing = False
    disk.row(0.1)
    assert len(caplog.records) == 2


def test_a_disk_that_cannot_be_asked_stops_nothing(disk, caplog, monkeypatch):
    def refuse(_):
        raise PermissionError

    monkeypatch.setattr(disk_space.shutil, "disk_usage", refuse)
    disk.start()
    assert not caplog.records
