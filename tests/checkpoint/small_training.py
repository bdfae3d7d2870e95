"""A small model in training, and its checkpoints, for the tests of this folder."""

import torch

from mamba3_train.checkpoint import folders
from mamba3_train.checkpoint.saver import Saver
from mamba3_train.checkpoint.training_state import training_tensors
from mamba3_train.model import Mamba3Config, Mamba3LM, MixerConfig, initialize
from mamba3_train.training.optimizer import adamw

DOCUMENTS = {folders.STATE: '{"step": 3}\n', folders.CONFIG: "run: {}\n"}


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


def save(checkpoints, *numbers, tensors=None, asynchronous=False, keep_last=9, **policy):
    """Save the same tensors as every one of the steps; returns the saver."""
    saver = Saver(checkpoints, asynchronous=asynchronous, keep_last=keep_last, **policy)
    for number in numbers:
        saver.start(number, tensors or {"weight": torch.arange(1000.0)}, DOCUMENTS)
        saver.wait()
    return saver


def save_model(checkpoints, number, **kwargs):
    model, optimizer = make(**kwargs)
    save(checkpoints, number, tensors=training_tensors(model, optimizer))
    return model, optimizer
