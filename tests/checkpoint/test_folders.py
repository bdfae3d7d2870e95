"""Published, found, verified, pruned."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from mamba3_train.checkpoint import folders
from mamba3_train.errors import UserError
from tests.checkpoint.small_training import save


def names(checkpoints):
    return sorted(path.name for path in checkpoints.iterdir())


def test_the_manifest_names_every_file_and_the_versions(tmp_path):
    save(tmp_path, 3)
    folder = tmp_path / "step-00000003"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["format"] == 1


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda f: (f / "manifest.json").unlink(), "is missing or broken"),
        (lambda f: next(f.glob("*.safetensors")).unlink(), "is missing"),
        (lambda f: next(f.glob("*.safetensors")).write_bytes(b"short"), "has 5 bytes instead of"),
        (lambda f: flip_a_bit(next(f.glob("*.safetensors"))), "has changed"),
        (lambda f: (f / "state.json").write_text('{"step": 9}\n'), "has changed"),
        (lambda f: (f / "manifest.json").write_text("{"), "is missing or broken"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_said(damage, complaint, tmp_path, caplog):
    save(tmp_path, 3, 6)
    assert folders.newest_whole(tmp_path).name == "step-00000006"
    damage(tmp_path / "step-00000006")
    assert folders.newest_whole(tmp_path).name == "step-00000003"
    assert complaint in caplog.text
    assert "step-00000006" in caplog.text


def test_one_that_storage_cannot_read_is_passed_over_and_said(tmp_path, monkeypatch, caplog):
    save(tmp_path, 3, 6)
    digest = folders.hashlib.file_digest

    def failing(file, kind):
        if "step-00000006" in file.name:
            raise OSError(errno.EIO, "Input/output error")
        return digest(file, kind)

    monkeypatch.setattr(folders.hashlib, "file_digest", failing)
    assert folders.newest_whole(tmp_path).name == "step-00000003"
    assert "cannot be read: Input/output error" in caplog.text


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("lost", ["*.safetensors", "manifest.json"])
def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_afresh(lost, tmp_path):
    assert folders.newest_whole(tmp_path) is None
    save(tmp_path, 1)
    next((tmp_path / "step-00000001").glob(lost)).unlink()
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged"):
        folders.newest_whole(tmp_path)


def test_old_ones_go(tmp_path):
    save(tmp_path, 1, 2, 3, 10, keep_last=2)
    assert names(tmp_path) == ["step-00000003", "step-00000010"]


def test_the_way_back_stays(tmp_path):
    save(tmp_path, 1, 2, 3, 4, keep_last=9)
    folders.prune(tmp_path, tmp_path / "step-00000004", keep_last=1, way_back=2)
    assert names(tmp_path) == ["step-00000002", "step-00000004"]


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Every file, then the folder under its hidden name, then, renamed, the folder that holds it."""
    on_disk, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        on_disk.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def renamed(source, target):
        on_disk.append(f"→ {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    save(tmp_path / "all", 1)
    files = {path.name for path in (tmp_path / "all" / "step-00000001").iterdir()}
    assert set(on_disk[: len(files)]) == files
    assert on_disk[len(files) - 1 :] == ["manifest.json", ".step-00000001.partial", "→ step-00000001", "all"]


def test_every_nth_stays(tmp_path):
    save(tmp_path, 2, 4, 5, 6, 8, 10, 11, keep_last=1, keep_every_n_steps=5)
    assert names(tmp_path) == ["step-00000005", "step-00000010", "step-00000011"]


def test_damaged_later_ones_do_not_push_out_what_was_just_saved(tmp_path):
    save(tmp_path, 1, 8, 9)
    save(tmp_path, 2, keep_last=1)
    assert names(tmp_path) == ["step-00000002", "step-00000008", "step-00000009"]


def test_leftovers_of_a_killed_process_go_and_nothing_else(tmp_path):
    save(tmp_path, 1)
    for name in (".step-00000002.partial", ".step-00000000.deleted", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("text")
    folders.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["notes", "step-00000001"]
