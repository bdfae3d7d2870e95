"""Training that begins with trained weights: as the command does it, once."""

import json
import shutil
import sys

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from mamba3_train.config import compose
from mamba3_train.evaluation.decoding import Decoder
from mamba3_train.model import Mamba3Config
from mamba3_train.train import cli
from mamba3_train.trained_model import open_trained_model
from tests.small_run import make_model, write_run

SMALL = [
    "+recipe=quickstart", "data.prepare.automatic=false", "data.validation_sequences=4", "data.sequence_length=16",
    "data.num_workers=0", "model.d_model=16", "model.d_mlp=16", "model.n_layers=1", "model.mixer.head_dim=16",
    "model.mixer.d_state=8", "trainer.log_every_n_steps=1", "validation.every_n_steps=0", "report.sample_prompt=null",
    "checkpoint.every_n_steps=1", "trainer.max_steps=2", "optimizer.lr=1e-5",
]  # fmt: skip


@pytest.fixture
def train(tmp_path, quickstart_corpus, monkeypatch, capfd):
    """Train in tmp_path/new; returns exit code, output and errors."""

    def call(*arguments):
        settings = [f"data.path={quickstart_corpus}", f"run.dir={tmp_path}/new", *arguments]
        monkeypatch.setattr(sys, "argv", ["mamba3_train", *SMALL, *settings])
        try:
            cli()
        except SystemExit as stop:
            return stop.code, *capfd.readouterr()
        return 0, *capfd.readouterr()

    return call


def test_a_new_run_begins_there_and_goes_on_without(train, tmp_path, quickstart_corpus):
    config = compose(*SMALL, f"data.path={quickstart_corpus}")
    model = make_model(Mamba3Config.from_dict(OmegaConf.to_container(config.model, resolve=True)))
    pretrained = write_run(tmp_path / "pretrained", model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (pretrained / name).unlink()
    begin = f"init_from={pretrained}"

    code, out, errors = train(begin, "trainer.max_steps=1")
    assert code == 0, errors
    assert f"starting {tmp_path}/new from {pretrained}, step 7" in out
    weights = load_file(next((tmp_path / "new/checkpoints/step-00000001").glob("*.safetensors")))
    for name, parameter in model.named_parameters():
        # One step of AdamW moves a weight by about the learning rate.
        assert (weights[f"model.{name}"] - parameter).abs().max() < 3e-5, name
    assert OmegaConf.load(tmp_path / "new/config.yaml").init_from == str(pretrained)

    shutil.rmtree(pretrained)
    code, out, errors = train(begin)
    assert code == 0, errors
    assert f"resuming {tmp_path}/new at step 1\n" in out
    rows = [json.loads(line) for line in (tmp_path / "new/metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 2
    assert losses[1] == pytest.approx(losses[0], abs=1), "it did not start anew"

    # What the resumed run left is decoded as it is computed row by row.
    opened = open_trained_model(tmp_path / "new", device="cpu", dtype="float64")
    assert opened.step == 2
    row = torch.randint(0, 4096, (1, 12))
    decoder, expected = Decoder(opened.model, [row[0, :7].tolist()], 5), opened.model(row)
    for column in range(7, 12):
        assert (decoder.logits - expected[:, column - 1]).abs().max() < 1e-9 * expected.abs().max()
        decoder.step(row[:, column])

    code, _, errors = train("trainer.max_steps=3")
    assert code == 2
    assert f"init_from ({pretrained} there, None now)" in errors


def test_mistakes_leave_no_trace(train, tmp_path, quickstart_corpus):
    code, _, errors = train(f"init_from={tmp_path}/nothing")
    assert (code, errors.count("\n")) == (2, 1)
    assert "nothing does not exist" in errors
    config = compose(*SMALL, f"data.path={quickstart_corpus}")
    model = make_model(Mamba3Config.from_dict(OmegaConf.to_container(config.model, resolve=True)))
    write_run(tmp_path / "pretrained", model)
    code, _, errors = train(f"init_from={tmp_path}/pretrained")
    assert (code, errors.count("\n")) == (2, 1)
    assert "gives other ids than that of the corpus" in errors
    assert f"tokenizer.file={tmp_path}/pretrained/tokenizer.json" in errors
    code, _, errors = train(f"init_from={tmp_path}/pretrained", "model.d_model=32")
    assert code == 2
    assert "model.d_model (16 there, 32 here)" in errors
    assert not (tmp_path / "new").exists()
