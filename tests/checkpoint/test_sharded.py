"""Saved, published, found, verified, pruned."""

import json

import pytest
import torch
from safetensors.torch import load_file

from mamba3_train.checkpoint import sharded
from mamba3_train.errors import UserError
from mamba3_train.model import Mamba3Config, Mamba3LM, MixerConfig, initialize
from mamba3_train.training.optimizer import adamw


def make(seed=0, steps=3, d_model=16):
    mixer = MixerConfig(d_state=8, head_dim=8, rank=2)
    config = Mamba3Config(vocab_size=20, d_model=d_model, n_layers=2, d_mlp=8, mixer=mixer)
    model = Mamba3LM(config)
    initialize(model, config, seed=seed)
    optimizer = adamw(model, lr=1e-2, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    model(torch.arange(20).view(2, 10)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def save(checkpoints, number, **kwargs):
    model, optimizer = make(**kwargs)
    sharded.save(sharded.step_folder(checkpoints, number), model, optimizer, {"step": number}, "run: {}\n")
    return model, optimizer


def test_what_was_saved_continues_identically(tmp_path):
    model, optimizer = save(tmp_path, 3)
    other, other_optimizer = make(seed=5, steps=0)
    state = sharded.load(sharded.newest_whole(tmp_path), other, other_optimizer)
    assert state == {"step": 3}
    for _ in range(3):
        step(model, optimizer)
        step(other, other_optimizer)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
    names = dict(model.named_parameters())
    assert {len(s) for s in optimizer.state.values()} == {3}
    assert len(other_optimizer.state) == len(names)
    assert [g["weight_decay"] for g in other_optimizer.param_groups] == [0.1, 0.0]


def test_weights_alone_can_be_loaded(tmp_path):
    model, _ = save(tmp_path, 3)
    other, _ = make(seed=5, steps=0)
    sharded.load(sharded.newest_whole(tmp_path), other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_files_are_readable_without_this_package(tmp_path):
    model, _ = save(tmp_path, 3)
    folder = tmp_path / "step-00000003"
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    assert torch.equal(tensors["model.layers.0.mixer.dt_bias"], model.layers[0].mixer.dt_bias)
    assert "optimizer.layers.1.mlp.fc2.weight.exp_avg_sq" in tensors
    assert set(json.loads((folder / "manifest.json").read_text())["files"]) == {
        file.name,
        "state.json",
        "config.yaml",
    }


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda f: (f / "manifest.json").unlink(), None),
        (lambda f: next(f.glob("*.safetensors")).unlink(), "is missing"),
        (lambda f: next(f.glob("*.safetensors")).write_bytes(b"short"), "has 5 bytes instead of"),
        (lambda f: flip_a_bit(next(f.glob("*.safetensors"))), "has changed"),
        (lambda f: (f / "state.json").write_text('{"step": 9}\n'), "has"),
        (lambda f: (f / "manifest.json").write_text("{"), "is missing or broken"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_said(damage, complaint, tmp_path, caplog):
    save(tmp_path, 3)
    save(tmp_path, 6)
    assert sharded.newest_whole(tmp_path).name == "step-00000006"
    damage(tmp_path / "step-00000006")
    assert sharded.newest_whole(tmp_path).name == "step-00000003"
    if complaint:
        assert complaint in caplog.text
        assert "step-00000006" in caplog.text


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_an_unfinished_save_is_never_found_and_does_not_stand_in_the_way(tmp_path, monkeypatch):
    save(tmp_path, 3)
    with monkeypatch.context() as patch:
        patch.setattr(sharded.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            save(tmp_path, 6)
    assert [p.name for p in sharded.published(tmp_path)] == ["step-00000003"]
    save(tmp_path, 6)
    assert sharded.newest_whole(tmp_path).name == "step-00000006"


def test_old_ones_go(tmp_path):
    for number in (1, 2, 10, 3):
        save(tmp_path, number, steps=1)
    sharded.keep_newest(tmp_path, 2, tmp_path / "step-00000010")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000010"]


def test_damaged_later_ones_do_not_push_out_what_was_just_saved(tmp_path):
    for number in (1, 2, 8, 9):
        save(tmp_path, number, steps=1)
    sharded.keep_newest(tmp_path, 1, tmp_path / "step-00000002")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000008", "step-00000009"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_afresh(tmp_path):
    assert sharded.newest_whole(tmp_path) is None
    save(tmp_path, 1, steps=1)
    next((tmp_path / "step-00000001").glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged"):
        sharded.newest_whole(tmp_path)


def test_another_model_is_refused(tmp_path):
    save(tmp_path, 3)
    other, optimizer = make(d_model=32, steps=0)
    with pytest.raises(UserError, match="does not fit this model"):
        sharded.load(tmp_path / "step-00000003", other, optimizer)
