"""Recomputing changes no bit, keeps less, and leaves the names of parameters alone."""

import pytest
import torch

from mamba3_train.errors import UserError
from mamba3_train.model import AttentionConfig, Mamba3Config, Mamba3LM, MixerConfig, initialize
from mamba3_train.training.activation_checkpointing import recompute_activations

CONFIG = Mamba3Config(
    vocab_size=50,
    d_model=32,
    n_layers=4,
    d_mlp=64,
    layer_pattern="MM*",
    mixer=MixerConfig(d_state=16, head_dim=16, rank=2),
    attention=AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=16),
)


def run(choice):
    model = Mamba3LM(CONFIG)
    initialize(model, CONFIG, seed=0)
    recompute_activations(model, choice)
    kept = []
    ids, documents = torch.arange(100).view(2, 50) % 50, (torch.arange(50) > 20).int().expand(2, 50)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss = model(ids, documents).square().mean()
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters()}, sum(kept)


def test_same_bits_less_memory():
    loss, gradients, kept = run("none")
    again, gradients_again, kept_again = run("full")
    assert torch.equal(loss, again)
    assert gradients.keys() == gradients_again.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_again[name]), name
    assert kept_again < kept / 4


def test_an_unknown_choice_is_refused():
    with pytest.raises(UserError, match="activation_checkpointing=half"):
        run("half")
