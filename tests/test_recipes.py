"""Every shipped recipe composes, builds on meta, and has the parameters and the set-up it claims."""

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from mamba3_train.config import compose, shipped_folder
from mamba3_train.model import Mamba3LM
from mamba3_train.model.cost import model_cost
from mamba3_train.training.assembly import build_module

# arXiv 2603.15569, appendix; the hybrid's attention is ours.
PARAMETERS = {
    "quickstart": 3_397_616,
    "180m_siso": 186_849_600,
    "180m_mimo": 186_849_600,
    "440m_siso": 443_015_680,
    "440m_mimo": 444_195_328,
    "880m_siso": 892_782_336,
    "880m_mimo": 892_782_336,
    "1.5b_siso": 1_494_723_584,
    "1.5b_mimo": 1_494_723_584,
    "1.5b_hybrid": 1_432_086_016,
    "parity": 17_828,
    "mod_arithmetic": 180_312,
    "mod_arithmetic_brackets": 180_824,
    "needle": 243_296,
    "compare_small": 16_757_312,
    "compare_state_size": 16_757_312,
}
PEAK_LR = {"180m": 3e-3, "440m": 1.5e-3, "880m": 1.25e-3, "1.5b": 1e-3}


def test_every_recipe_is_listed_here():
    # Recipes in folders are bases that others inherit.
    assert {path.stem for path in shipped_folder("recipes").glob("*.yaml")} == PARAMETERS.keys()


@pytest.mark.parametrize("recipe", PARAMETERS)
def test_recipe_builds_with_its_parameters(recipe):
    config = compose(f"+recipe={recipe}")
    assert config.run.name == recipe
    model_config = instantiate(config.model)
    with torch.device("meta"):
        model = Mamba3LM(model_config)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[recipe]
    assert model_cost(model_config, config.data.sequence_length).total_parameters == PARAMETERS[recipe]
    module = build_module(config, model_config)
    assert module.schedule(config.trainer.max_steps) == pytest.approx(config.schedule.min_lr)
    OmegaConf.to_yaml(config, resolve=True)


@pytest.mark.parametrize("recipe", sorted(r for r in PARAMETERS if r.split("_")[0] in PEAK_LR))
def test_paper_recipes_train_as_the_paper_did(recipe):
    config = compose(f"+recipe={recipe}")
    size, kind = recipe.split("_")
    assert config.data.sequence_length == 2048
    assert config.data.path.endswith("fineweb_edu")
    tokens = config.trainer.max_steps * config.data.global_batch_size * config.data.sequence_length
    assert tokens == pytest.approx(100e9, rel=1e-3)
    assert config.optimizer.lr == PEAK_LR[size]
    assert list(config.optimizer.betas) == [0.9, 0.95]
    assert (config.optimizer.weight_decay, config.trainer.gradient_clip_norm) == (0.1, 1.0)
    mixer = config.model.mixer
    assert (mixer.d_state, mixer.head_dim, mixer.expand) == (128, 64, 2)
    assert mixer.rank == (4 if kind == "mimo" else 1)
    assert mixer.output_norm == (kind == "hybrid")


def test_hybrid_is_five_to_one():
    model = instantiate(compose("+recipe=1.5b_hybrid").model)
    assert model.layers == "MMMMM*" * 4
    assert not model.attention.rotary


@pytest.mark.parametrize("choice", ["schedule=wsd", "logger=wandb", "mixer=mimo", "kernels=triton", "model=440m"])
def test_groups_override_a_recipe(choice):
    changed, plain = compose("+recipe=1.5b_siso", choice), compose("+recipe=1.5b_siso")
    assert changed != plain
