"""Trained weights as first values: all of them, whatever pads the vocabulary; another model is refused by its keys."""

from pathlib import Path

import pytest
import torch

from mamba3_train.checkpoint.official_mamba import load_official
from mamba3_train.checkpoint.starting_weights import StartingWeights
from mamba3_train.errors import UserError
from mamba3_train.model import AttentionConfig, Mamba3LM, MixerConfig, initialize
from tests.small_run import make_config, make_model, write_run

PUBLIC = Path(__file__).parents[1] / "golden" / "official_lm_mimo_r4"


def begun(start, config):
    """A new model that begins with these weights."""
    model = Mamba3LM(config)
    initialize(model, config, seed=5, value=start.value)
    return model


def test_a_run_begins_with_the_weights_of_another(tmp_path):
    config = make_config("M*", tie_embeddings=False)
    before = make_model(config)
    start = StartingWeights(write_run(tmp_path, before, steps=(3, 7)), config)
    assert start.description == f"{tmp_path}, step 7"
    start.verify()
    for (name, value), expected in zip(begun(start, config).named_parameters(), before.parameters(), strict=True):
        assert torch.equal(value, expected), name


def test_a_public_checkpoint_is_a_start():
    before = load_official(PUBLIC)
    model = begun(StartingWeights(PUBLIC, before.config), before.config)
    ids = torch.randint(0, 203, (1, 20))
    assert torch.equal(model(ids), before(ids))


@pytest.mark.parametrize("multiple", [1, 64])
def test_the_vocabulary_may_be_padded_otherwise(tmp_path, multiple):
    before = make_model(make_config(vocab_multiple=8))
    config = make_config(vocab_multiple=multiple)
    model = begun(StartingWeights(write_run(tmp_path, before), config), config)
    rows = min(config.padded_vocab_size, 272)
    assert rows == {1: 270, 64: 272}[multiple]
    assert torch.equal(model.embedding.weight[:rows], before.embedding.weight[:rows])
    fresh = Mamba3LM(config)
    initialize(fresh, config, seed=5)
    assert torch.equal(model.embedding.weight[rows:], fresh.embedding.weight[rows:])


def test_a_count_that_includes_the_padding_is_the_same_vocabulary(tmp_path):
    folder = write_run(tmp_path, make_model(make_config(vocab_size=270)))
    StartingWeights(folder, make_config(vocab_size=272))
    with pytest.raises(UserError, match=r"has a vocabulary of 270, data.vocab_size=273: prepare the corpus with"):
        StartingWeights(folder, make_config(vocab_size=273))
    with pytest.raises(UserError, match=r"has a vocabulary of 270, data.vocab_size=200"):
        StartingWeights(folder, make_config(vocab_size=200))


def test_what_only_new_models_need_may_differ(tmp_path):
    before = make_model(make_config())
    other = make_config(
        layer_pattern="MM",
        mixer=MixerConfig(d_state=8, head_dim=8, rank=2, dt_max=0.2),
        attention=AttentionConfig(n_heads=4),  # of which it has none
    )
    model = begun(StartingWeights(write_run(tmp_path, before), other), other)
    assert torch.equal(model.embedding.weight, before.embedding.weight)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"d_model": 32}, r"model.d_model \(16 there, 32 here\); set them"),
        ({"n_layers": 3}, r"model.n_layers \(2 there, 3 here\), model.layer_pattern \(MM there, MMM here\)"),
        ({"layer_pattern": "M*"}, r"layer_pattern \(MM there, M\* here\)"),
        ({"mixer": MixerConfig(d_state=8, head_dim=8, rank=4)}, r"model.mixer.rank \(2 there, 4 here\);"),
        ({"tie_embeddings": False}, r"model.tie_embeddings \(True there, False here\)"),
        ({"norm_eps": 1e-6}, r"model.norm_eps"),
    ],
)
def test_another_model_is_refused_by_its_keys(tmp_path, settings, complaint):
    folder = write_run(tmp_path, make_model(make_config()))
    with pytest.raises(UserError, match=complaint) as caught:
        StartingWeights(folder, make_config(**settings))
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"init_from: .* holds neither"):
        StartingWeights(tmp_path, make_config())


def test_damage_is_found_before_it_is_used(tmp_path):
    start = StartingWeights(write_run(tmp_path, make_model(make_config())), make_config())
    (tmp_path / "checkpoints" / "step-00000007" / "state.json").write_text('{"step": 8}\n')
    with pytest.raises(UserError, match=r"state.json has changed since it was written"):
        start.verify()
