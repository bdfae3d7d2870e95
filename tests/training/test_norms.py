"""Norms agree with a count by hand (tests/test_train.py has those of shards); a step that is not logged has none."""

from types import SimpleNamespace

import pytest
import torch

from mamba3_train.training.callbacks import Norms
from mamba3_train.training.strategies import clip_and_step

CLIP = 0.5


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(4, 3)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(3, 3) for _ in range(2)])
        self.norm = torch.nn.RMSNorm(3)


def step(norms, model, number, max_steps=10):
    """One step whose optimizer clips, as in training; returns the norms, gradients before it and changes."""
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    trainer = SimpleNamespace(global_step=number - 1, max_steps=max_steps, strategy=None)
    module = SimpleNamespace(model=model, trainer=trainer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def update():
        norms.on_before_optimizer_step(trainer, module, None)
        optimizer.step()

    wrapped = SimpleNamespace(optimizer=optimizer, step=update, zero_grad=optimizer.zero_grad)
    clip_and_step(None, model, wrapped, CLIP, skip=torch.tensor(False))
    changes = [a - b.detach() for a, b in zip(before, model.parameters(), strict=True)]
    return norms.take(module), gradients, changes


def length(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors]).norm().item()


def test_norms_agree_with_a_count_by_hand():
    model = Model()
    values, gradients, changes = step(Norms(every_n_steps=2, of_layers=True), model, number=4)
    assert values["train/param_norm"].item() == pytest.approx(length([p.detach() for p in model.parameters()]))
    assert values["train/update_norm"].item() == pytest.approx(length(changes))
    assert length(gradients.values()) > CLIP, "the gradient was meant to be clipped"
    for name in ("embedding", "layers.0", "layers.1", "norm"):
        expected = length([gradient for key, gradient in gradients.items() if key.startswith(name + ".")])
        assert values.pop(f"train/grad_norm/{name}").item() == pytest.approx(expected, rel=1e-5), name
    assert set(values) == {"train/param_norm", "train/update_norm"}


def test_a_step_that_is_not_logged_is_left_alone_and_the_last_is_logged():
    norms, model = Norms(every_n_steps=2, of_layers=True), Model()
    assert step(norms, model, number=3)[0] == {}
    assert norms._before is None
    assert step(norms, model, number=5, max_steps=5)[0]
    assert step(norms, model, number=5, max_steps=9)[0] == {}
