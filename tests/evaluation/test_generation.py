"""Sampling continues what the model predicts, and the loss curve is a picture."""

import pytest
import torch

from mamba3_train.evaluation.generation import generate
from mamba3_train.evaluation.loss_curve import plot_loss
from mamba3_train.model import AttentionConfig, Mamba3Config, Mamba3LM, MixerConfig, initialize


@pytest.fixture(params=["M", "M*"])
def model(request):
    mixer, attention = MixerConfig(d_state=8, head_dim=8, rank=2), AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=8)
    config = Mamba3Config(
        vocab_size=11, d_model=16, n_layers=2, d_mlp=8, layer_pattern=request.param, mixer=mixer, attention=attention
    )
    model = Mamba3LM(config)
    initialize(model, config, seed=0)
    return model


def test_greedy_takes_the_likeliest_token_of_the_whole_row(model):
    tokens = generate(model, torch.tensor([[1, 2, 3], [4, 5, 6]]), 8, temperature=0)
    assert tokens.shape == (2, 11)
    for t in range(3, 11):
        assert torch.equal(model(tokens[:, :t])[:, -1, :11].argmax(-1), tokens[:, t])


def test_padding_entries_of_the_vocabulary_are_never_drawn(model):
    with torch.no_grad():
        model.embedding.weight[11:] = 100 * model.embedding.weight[:5]
    tokens = generate(model, torch.ones(8, 1, dtype=torch.long), 40, temperature=5.0)
    assert tokens.max() < 11


def test_seed_decides_and_end_stops(model):
    prompt = torch.tensor([[1, 2]])

    def draw(seed, **options):
        return generate(model, prompt, 30, generator=torch.Generator().manual_seed(seed), **options)

    first = draw(1)
    assert torch.equal(first, draw(1))
    assert not torch.equal(first, draw(2))
    end = int(first[0, 10])
    stopped = draw(1, end_id=end)
    assert stopped[0, -1] == end
    assert end not in stopped[0, 2:-1]
    assert torch.equal(first[:, : stopped.shape[1]], stopped)


def test_loss_curve_is_a_png(tmp_path):
    rows = [{"step": s, "tokens": 10 * s, "train/loss": 5 / s} for s in range(1, 20)]
    plot_loss([*rows, {"step": 19, "tokens": 190, "val/loss": 0.3}], tmp_path / "loss.png", "a run")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
