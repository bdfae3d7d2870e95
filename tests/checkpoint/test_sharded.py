"""Tensors in and out of files: exact, readable without this package, refused when they do not fit."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mamba3_train.checkpoint import folders, sharded
from mamba3_train.checkpoint.training_state import restore, training_tensors
from mamba3_train.errors import UserError
from tests.checkpoint.small_training import make, save, save_model, step


def test_what_was_saved_continues_identically(tmp_path):
    model, optimizer = save_model(tmp_path, 3)
    other, other_optimizer = make(seed=5, steps=0)
    restore(folders.newest_whole(tmp_path), other, other_optimizer)
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
    model, _ = save_model(tmp_path, 3)
    other, _ = make(seed=5, steps=0)
    restore(folders.newest_whole(tmp_path), other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_files_are_readable_without_this_package(tmp_path):
    model, optimizer = save_model(tmp_path, 3)
    (file,) = (tmp_path / "step-00000003").glob("*.safetensors")
    tensors = load_file(file)
    expected = training_tensors(model, optimizer)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    assert "optimizer.layers.1.mlp.fc2.weight.exp_avg_sq" in tensors


@pytest.mark.parametrize("dtype", list(sharded._DTYPES))
@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_every_dtype_and_shape_survives(dtype, shape, tmp_path):
    """Beside a tensor of one byte, which would push the others off their alignment."""
    values = torch.randn(shape).mul(9).to(dtype)
    save(tmp_path, 3, tensors={"a": torch.ones(1, dtype=torch.uint8), "b": values.t()})
    loaded = {"b": torch.zeros_like(values.t())}
    sharded.load(tmp_path / "step-00000003", loaded)
    assert torch.equal(loaded["b"], values.t())
    (file,) = (tmp_path / "step-00000003").glob("*.safetensors")
    assert torch.equal(load_file(file)["b"], values.t())


def test_a_file_longer_than_a_chunk_is_hashed_and_written_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(sharded, "_CHUNK_BYTES", 7)
    values = torch.randn(50)
    save(tmp_path, 3, tensors={"a": values})
    folder = tmp_path / "step-00000003"
    assert folders.complaint(folder) is None
    (file,) = folder.glob("*.safetensors")
    assert torch.equal(load_file(file)["a"], values)
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["DCP_SHARDING_INFO"]) == {"a": {"saved_offsets": [0]}}


def test_another_model_is_refused(tmp_path):
    save_model(tmp_path, 3)
    other, optimizer = make(d_model=32, steps=0)
    with pytest.raises(UserError, match="does not fit this model"):
        restore(tmp_path / "step-00000003", other, optimizer)
    with pytest.raises(UserError, match="weight"):
        sharded.load(tmp_path / "step-00000003", {"weight_of_nobody": torch.ones(1)})
