"""Under the real Trainer with two processes: each rank reads its own part of the order, also after a resume."""

import lightning
import numpy as np
import pytest
import torch

from mamba3_train.data import TokenDataModule
from mamba3_train.data.packing import unpack


class Recorder(lightning.LightningModule):
    """Writes the rows that its rank was given at each step."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, index):
        np.save(self.folder / f"step-{self.global_step}-rank-{self.global_rank}.npy", batch["input_ids"].numpy())
        return self.layer(torch.ones(1)).sum()

    def on_train_end(self):
        self.trainer.save_checkpoint(self.folder / "checkpoint.ckpt")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def data_module(corpus, samples_consumed=0) -> TokenDataModule:
    data = TokenDataModule(
        path=str(corpus), sequence_length=16, global_batch_size=8, micro_batch_size=2, seed=1, num_workers=1
    )
    data.samples_consumed, data.total_steps = samples_consumed, 6
    return data


def train(corpus, folder, stop, step=0) -> None:
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        use_distributed_sampler=False,
        max_steps=stop,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    checkpoint = str(folder / "checkpoint.ckpt")
    trainer.fit(Recorder(folder), data_module(corpus, 8 * step), ckpt_path=checkpoint if step else None)


@pytest.mark.filterwarnings("ignore")
def test_ranks_continue_their_own_part_twice(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for begin, end in ((0, 2), (2, 3), (3, 6)):
        train(corpus, tmp_path, end, step=begin)
        assert len(list(tmp_path.glob("step-*.npy"))) == 2 * end
    alone = data_module(corpus)
    alone.setup()
    expected = [unpack(batch)["input_ids"].numpy() for batch in alone.train_dataloader()]
    assert len(expected) == 6
    for step, rows in enumerate(expected):
        parts = [np.load(tmp_path / f"step-{step}-rank-{rank}.npy") for rank in range(2)]
        assert np.array_equal(np.concatenate(parts), rows)
        assert not np.array_equal(parts[0], parts[1])
