"""When the callback saves, what it does when storage fails, and that a run goes on exactly where it was."""

import errno
import random
from types import SimpleNamespace

import lightning
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from mamba3_train.checkpoint import folders, saver
from mamba3_train.checkpoint.random_state import random_tensors, set_random_tensors
from mamba3_train.data.sampler import StepSampler
from mamba3_train.errors import UserError
from mamba3_train.training import processes
from mamba3_train.training.callbacks import Checkpointing
from mamba3_train.training.data_cursor import DataCursor
from mamba3_train.training.step_guard import StepGuard
from tests.checkpoint.small_training import save


class Dropping(lightning.LightningModule):
    """A model whose every step draws from every generator of the process."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.seed, self.guard = 3, StepGuard()
        torch.manual_seed(11)
        self.model = torch.nn.Linear(4, 4)
        self.losses = {}

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def training_step(self, batch, index):
        noise = random.gauss(0, 1) + np.random.normal()
        loss = (torch.nn.functional.dropout(self.model(batch), 0.5) - noise).square().mean()
        optimizer = self.optimizers()
        self.manual_backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        self.losses[self.trainer.global_step] = loss.item()


class Rows(Dataset):
    def __getitem__(self, positions):
        return torch.full((2, 4), float(positions.start))


def checkpointing(folder, **settings):
    settings = {"every_n_steps": 4, "keep_last": 9, "keep_every_n_steps": 0, "asynchronous": True} | settings
    callback = Checkpointing(folder, cursor=DataCursor(1), config_yaml="run: {}\n", **settings)
    callback.SECONDS_BETWEEN = 0.0
    return callback


def train(folder, steps, callback=None):
    """Train up to a step, from the newest checkpoint of the folder; returns module and callback."""
    module, callback = Dropping(), callback or checkpointing(folder)
    callback.resume_from = folders.newest_whole(folder)
    done = folders.read_state(callback.resume_from)["step"] if callback.resume_from else 0
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=steps, callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    rows = StepSampler(
        samples_consumed=done, steps=steps - done, length=steps, global_batch_size=1, rank=0, world_size=1
    )
    trainer.fit(module, DataLoader(Rows(), sampler=rows, batch_size=None))
    assert trainer.global_step == steps
    return module, callback


def steps(folder):
    return [int(path.name[-8:]) for path in folders.published(folder)]


@pytest.fixture
def failing(monkeypatch):
    """Makes the next n attempts to write fail as a full disk does."""

    def fail(times):
        left = [times]

        def write(path, pieces):
            if left[0]:
                left[0] -= 1
                path.write_bytes(b"half a shard")
                raise OSError(errno.ENOSPC, "No space left on device")
            return saved(path, pieces)

        monkeypatch.setattr(saver, "write_shard", write)

    saved = saver.write_shard
    return fail


@pytest.mark.filterwarnings("ignore")
def test_two_resumes_draw_the_same_random_numbers_as_none(tmp_path):
    whole, _ = train(tmp_path / "whole", 12)
    losses = {}
    for stop in (3, 8, 12):
        part, _ = train(tmp_path / "parts", stop)
        losses |= part.losses
    assert losses == whole.losses
    assert len(losses) == 12
    assert torch.equal(part.model.weight, whole.model.weight)


@pytest.mark.filterwarnings("ignore")
def test_no_rank_learns_of_an_outcome_before_all_have_written(tmp_path, monkeypatch):
    """Else some would try a failed save again and others would not. Here another rank writes until the next save."""
    monkeypatch.setattr(processes.SharedFlag, "largest", lambda flag, finished: 1)
    writing, training_step = {}, Dropping.training_step

    def watched(module, batch, index):
        training_step(module, batch, index)
        callback._saver._thread and callback._saver._thread.join()
        writing[module.trainer.global_step] = callback.writing

    monkeypatch.setattr(Dropping, "training_step", watched)
    callback = checkpointing(tmp_path)
    train(tmp_path, 9, callback)
    assert writing == {step: step > 4 for step in range(1, 10)}
    assert steps(tmp_path) == [4, 8, 9]


@pytest.mark.filterwarnings("ignore")
def test_a_roll_back_draws_again_what_followed_the_checkpoint(tmp_path, monkeypatch):
    drawn, training_step = [], Dropping.training_step

    def noted(module, batch, index):
        torch_state = torch.get_rng_state()
        drawn.append((module.trainer.global_step, torch.rand(1).item(), random.random(), np.random.rand()))
        torch.set_rng_state(torch_state)
        return training_step(module, batch, index)

    class Back(lightning.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            if trainer.global_step == 6 and len(drawn) == 6:
                callback.roll_back(trainer, module, tmp_path / "step-00000004")

    monkeypatch.setattr(Dropping, "training_step", noted)
    callback = checkpointing(tmp_path, asynchronous=False)
    trainer_of = lightning.Trainer
    monkeypatch.setattr(lightning, "Trainer", lambda callbacks, **k: trainer_of(callbacks=[Back(), *callbacks], **k))
    train(tmp_path, 8, callback)
    assert drawn[6:8] == drawn[4:6]
    assert [step for step, *_ in drawn] == [*range(6), *range(4, 8)]


def test_on_another_number_of_processes_random_numbers_start_anew_and_it_says_so(tmp_path, caplog):
    caplog.set_level("INFO", logger="mamba3_train")
    callback = checkpointing(tmp_path)
    state, module = {"step": 4, "world_size": 2}, SimpleNamespace(seed=3)
    draws = []
    for rank in (0, 1, 0):
        callback._load_random_state(tmp_path, state, SimpleNamespace(world_size=1, global_rank=rank), module)
        draws.append(torch.rand(1).item())
    assert draws[0] == draws[2] != draws[1]
    assert "random numbers start anew: 2 processes saved, 1 go on" in caplog.text


def test_a_run_that_began_without_a_gpu_goes_on_with_one(tmp_path, monkeypatch):
    save(tmp_path, 4, tensors=random_tensors(0))
    state = {"step": 4, "world_size": 1}
    generators = random_tensors(0) | {"random.00000.cuda": torch.zeros(16, dtype=torch.uint8)}
    monkeypatch.setattr("mamba3_train.training.callbacks.checkpointing.random_tensors", lambda rank: dict(generators))
    callback, trainer = checkpointing(tmp_path), SimpleNamespace(world_size=1, global_rank=0)
    expected = torch.rand(1)  # of what was saved
    torch.manual_seed(99)
    callback._load_random_state(tmp_path / "step-00000004", state, trainer, SimpleNamespace(seed=3))
    assert "random.00000.cuda" not in callback._random_state
    set_random_tensors(callback._random_state)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_it_saves_every_few_steps_and_at_the_end(asynchronous, tmp_path):
    train(tmp_path, 10, checkpointing(tmp_path, asynchronous=asynchronous))
    assert steps(tmp_path) == [4, 8, 10]
    assert folders.read_state(tmp_path / "step-00000008") == {"step": 8, "samples": 8, "rollbacks": 0, "world_size": 1}


@pytest.mark.filterwarnings("ignore")
def test_a_strategy_that_keeps_its_optimizer_step_to_itself_is_found_out(tmp_path, monkeypatch):
    """It would change tensors while they are copied."""
    monkeypatch.setattr(Checkpointing, "on_before_optimizer_step", lambda *_: None)
    with pytest.raises(RuntimeError, match="may mix two steps"):
        train(tmp_path, 10)


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_checkpoint_of_the_same_step_is_written_again(tmp_path):
    train(tmp_path, 8)
    (tmp_path / "step-00000008" / "config.yaml").write_text("damaged")
    train(tmp_path, 8)
    assert folders.newest_whole(tmp_path).name == "step-00000008"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("failures", "saved"), [(1, [17, 32, 40]), (2, [19, 32, 40]), (3, [23, 32, 40])])
def test_storage_that_fails_is_tried_again_ever_later(failures, saved, failing, tmp_path, caplog):
    failing(failures)
    _, callback = train(tmp_path, 40, checkpointing(tmp_path, every_n_steps=16, asynchronous=False))
    assert steps(tmp_path) == saved
    assert callback.failure is None
    assert (
        caplog.text.count("step 16 is not saved: rank 0: No space left on device; the newest checkpoint is none") == 1
    )
    assert caplog.text.count("training goes on") == failures
    assert not list(tmp_path.glob(".*"))


@pytest.mark.filterwarnings("ignore")
def test_a_failure_beside_training_is_noticed_and_made_good(failing, tmp_path, caplog, monkeypatch):
    def wait_for_the_disk(callback, *_):
        if callback._writing_step is not None:
            callback._saver._thread.join()

    monkeypatch.setattr(Checkpointing, "on_train_batch_end", wait_for_the_disk)
    failing(1)
    train(tmp_path, 24)
    assert caplog.text.count("training goes on") == 1
    # Step 4 failed while step 5 was taken; the next step is saved in its place.
    assert steps(tmp_path) == [6, 8, 12, 16, 20, 24]


@pytest.mark.filterwarnings("ignore")
def test_the_last_step_is_tried_again_and_its_failure_is_kept(failing, tmp_path):
    failing(2)
    _, callback = train(tmp_path / "mended", 3)
    assert callback.failure is None
    assert steps(tmp_path / "mended") == [3]
    failing(3)
    _, callback = train(tmp_path / "broken", 3)
    assert "step 3 is not saved: rank 0: No space left on device" in callback.failure
    assert steps(tmp_path / "broken") == []


@pytest.mark.parametrize("setting", [{"every_n_steps": 0}, {"keep_last": 0}, {"keep_every_n_steps": -1}])
def test_settings_that_would_lose_checkpoints_are_refused(setting, tmp_path):
    (key,) = setting
    with pytest.raises(UserError, match=f"checkpoint.{key}={setting[key]} must be at least"):
        checkpointing(tmp_path, **setting)
