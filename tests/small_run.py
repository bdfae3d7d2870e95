"""A run folder with a small model in it, as training leaves one, made without training."""

from functools import cache

import torch
from omegaconf import OmegaConf

from mamba3_train.checkpoint import folders
from mamba3_train.checkpoint.saver import Saver
from mamba3_train.checkpoint.training_state import training_tensors
from mamba3_train.data.tokenizer import Tokenizer
from mamba3_train.model import AttentionConfig, Mamba3Config, Mamba3LM, MixerConfig, initialize

TEXT = "the state of a recurrent model has a fixed size, and keys and values grow with every token. " * 3


@cache
def tokenizer():
    return Tokenizer.train([TEXT], 270)


def make_config(pattern="M", rank=2, **settings):
    base = {
        "vocab_size": 270,
        "d_model": 16,
        "n_layers": 2,
        "d_mlp": 24,
        "layer_pattern": pattern,
        "mixer": MixerConfig(d_state=8, head_dim=8, rank=rank),
        "attention": AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=8, rotary=True),
    }
    return Mamba3Config(**base | settings)


def make_model(config, seed=0, kernels="reference"):
    """A model whose every parameter, those that start at a constant too, has values of its own."""
    model = Mamba3LM(config, kernels=kernels)
    initialize(model, config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.embedding.weight.mul_(20)  # so that what follows depends on what came before
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def write_run(folder, model, steps=(7,), **data):
    """Save a model as a run's checkpoints of these steps; returns the folder."""
    config_yaml = OmegaConf.to_yaml({"model": model.config.to_dict(), "data": {"path": "nowhere", **data}})
    saver = Saver(folder / "checkpoints", asynchronous=False, keep_last=9)
    for step in steps:
        documents = {folders.STATE: f'{{"step": {step}}}\n', folders.CONFIG: config_yaml}
        saver.start(step, training_tensors(model), documents)
        saver.wait()
    (folder / folders.CONFIG).write_text(config_yaml)
    for name, text in tokenizer().documents().items():
        (folder / name).write_text(text)
    return folder
