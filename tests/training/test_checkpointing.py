"""When the callback saves, and what it may not take for saved."""

from types import SimpleNamespace

import torch

from mamba3_train.checkpoint import sharded
from mamba3_train.training.callbacks import Checkpointing


def save_at(folder, step, callback=None):
    model = torch.nn.Linear(2, 2)
    optimizer = SimpleNamespace(optimizer=torch.optim.AdamW(model.parameters()))
    module = SimpleNamespace(model=model, optimizers=lambda: optimizer)
    callback = callback or Checkpointing(
        folder, every_n_steps=2, keep_last=3, samples_per_step=4, config_yaml="run: {}\n", resume_from=None
    )
    callback.save(SimpleNamespace(global_step=step, is_global_zero=True), module)
    return callback


def test_a_damaged_checkpoint_of_the_same_step_is_written_again(tmp_path):
    save_at(tmp_path, 4)
    save_at(tmp_path, 6)
    (weights,) = (tmp_path / "step-00000006").glob("*.safetensors")
    weights.write_bytes(b"damaged")
    assert sharded.newest_whole(tmp_path).name == "step-00000004"
    save_at(tmp_path, 6)
    assert sharded.newest_whole(tmp_path).name == "step-00000006"
    assert sharded.read_state(tmp_path / "step-00000006")["samples"] == 24


def test_a_step_is_saved_once(tmp_path):
    callback = save_at(tmp_path, 6)
    before = (tmp_path / "step-00000006" / "manifest.json").stat().st_mtime_ns
    save_at(tmp_path, 6, callback)
    assert (tmp_path / "step-00000006" / "manifest.json").stat().st_mtime_ns == before
