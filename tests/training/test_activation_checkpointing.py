"""Recomputing changes no bit, keeps less, and leaves the names of parameters alone."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mamba3_train.errors import UserError
from mamba3_train.model import AttentionConfig, Mamba3Config, Mamba3LM, MixerConfig, initialize
from mamba3_train.training.activation_checkpointing import EXPENSIVE, recompute_activations
from mamba3_train.training.compilation import compile_layers

CONFIG = Mamba3Config(
    vocab_size=50,
    d_model=32,
    n_layers=3,
    d_mlp=64,
    layer_pattern="MM*",
    mixer=MixerConfig(d_state=16, head_dim=16, rank=2),
    attention=AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=16),
)


class CountedProducts(TorchDispatchMode):
    """Counts what `selective` is to compute only once."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.name().partition(".")[0] in EXPENSIVE
        return function(*args, **(kwargs or {}))


def run(choice, compiled=False):
    model = Mamba3LM(CONFIG)
    initialize(model, CONFIG, seed=0)
    recompute_activations(model, choice)
    if compiled:
        compile_layers(model, backend="aot_eager")
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


def test_selective_computes_no_expensive_result_twice():
    counts = {}
    for choice in ("none", "selective", "full"):
        with CountedProducts() as products:
            run(choice)
        counts[choice] = products.count
    assert counts["none"] == counts["selective"] < counts["full"]


def test_selective_gives_the_same_bits_and_keeps_less():
    loss, gradients, kept = run("none")
    again, gradients_again, kept_again = run("selective")
    assert torch.equal(loss, again)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_again[name]), name
    assert kept_again < kept / 4


@pytest.mark.parametrize("choice", ["none", "selective", "full"])
def test_compiled_layers_give_the_same_bits(choice):
    """Through the tracer and autograd's partition, without the code generator, which rounds in other places."""
    torch.compiler.reset()
    loss, gradients, _ = run(choice)
    again, gradients_again, _ = run(choice, compiled=True)
    assert torch.equal(loss, again)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, gradients_again[name], rtol=1e-5, atol=1e-8), name


def test_an_unknown_choice_is_refused():
    with pytest.raises(UserError, match="activation_checkpointing=half"):
        run("half")
