"""Layer patterns, packed documents, states, initial values and parameter roles of whole models."""

import copy

import pytest
import torch

from mamba3_train.errors import UserError
from mamba3_train.model import AttentionConfig, Mamba3Config, Mamba3LM, MixerConfig, initialize
from mamba3_train.model.initialization import DYNAMICS, is_decayed, keeps_float32

MIXER = MixerConfig(d_state=8, head_dim=8, rank=2, output_norm=True)
ATTENTION = AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=8)


def make_config(**settings):
    base = {"vocab_size": 61, "d_model": 16, "n_layers": 3, "d_mlp": 24, "mixer": MIXER, "attention": ATTENTION}
    return Mamba3Config(**base | settings)


def make_model(dtype=torch.float64, **settings):
    config = make_config(**settings)
    model = Mamba3LM(config)
    initialize(model, config, seed=3)
    return model.to(dtype)


VARIANTS = [
    {"layer_pattern": "M"},
    {"layer_pattern": "MM*"},
    {"layer_pattern": "*"},
    {"layer_pattern": "*", "attention": AttentionConfig(n_heads=4, n_kv_heads=4, head_dim=8, rotary=True)},
    {"layer_pattern": "M*", "tie_embeddings": False, "d_mlp": 0},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_prefill_and_decoding_equal_the_whole_row(settings):
    model, ids = make_model(**settings), torch.randint(0, 61, (2, 12))
    expected = model(ids)
    assert expected.shape == (2, 12, 64), "the vocabulary is padded to a multiple of 8"
    logits, state = model(ids[:, :5], return_state=True)
    parts = [logits]
    for t in range(5, 12):
        logits, state = model(ids[:, t : t + 1], state=state, return_state=True)
        parts.append(logits)
    assert torch.allclose(torch.cat(parts, 1), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_a_state_after_packed_documents_is_the_last_ones(settings):
    """Rows whose last documents have different lengths; the next pass begins with one that goes on."""
    model, ids = make_model(**settings), torch.randint(0, 61, (2, 20))
    before = torch.tensor([[0] * 7 + [1] * 5, [0] * 2 + [1] * 1 + [2] * 9])
    after = torch.tensor([[1] * 3 + [2] * 5, [2] * 8])
    _, state = model(ids[:, :12], before, return_state=True)
    logits, last = model(ids[:, 12:], after, state=state, return_state=True)
    assert torch.allclose(logits[:1, :3], model(ids[:1, 7:15])[:, 5:], rtol=1e-9, atol=1e-11)
    assert torch.allclose(logits[:1, 3:], model(ids[:1, 15:]), rtol=1e-9, atol=1e-11)
    assert torch.allclose(logits[1:], model(ids[1:, 3:])[:, 9:], rtol=1e-9, atol=1e-11)
    token = torch.tensor([[1], [2]])
    step = model(token, state=last)
    for row, begin in ((0, 15), (1, 3)):
        whole = torch.cat([ids[row : row + 1, begin:], token[row : row + 1]], 1)
        assert torch.allclose(step[row], model(whole)[0, -1:], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_a_packed_document_is_as_if_alone(settings):
    model, ids = make_model(**settings), torch.randint(0, 61, (1, 20))
    documents = torch.tensor([[0] * 7 + [1] * 1 + [2] * 12])
    packed = model(ids, documents)
    for start, stop in ((0, 7), (7, 8), (8, 20)):
        assert torch.allclose(packed[:, start:stop], model(ids[:, start:stop]), rtol=1e-9, atol=1e-11)
    assert not torch.allclose(packed, model(ids))


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_the_loss_and_gradient_of_a_document_do_not_see_another(settings):
    model = make_model(torch.float32, **settings)
    ids, documents = torch.randint(0, 61, (1, 20)), torch.tensor([[0] * 9 + [1] * 11])
    other = ids.clone()
    other[:, :9] = (ids[:, :9] + 1) % 61
    results = []
    for tokens in (ids, other):
        model.zero_grad()
        logits = model(tokens, documents)[:, 9:]
        logits.square().sum().backward()
        results.append([logits.detach(), *(copy.deepcopy(p.grad) for p in model.layers.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_initialisation_touches_every_parameter(settings):
    config = make_config(**settings)
    with torch.device("meta"):
        model = Mamba3LM(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    initialize(model, config, seed=1)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
    again = make_model(torch.float32, **settings)
    initialize(again, config, seed=1)
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_initialisation_does_not_depend_on_the_default_device():
    config = make_config()
    model, elsewhere = Mamba3LM(config), Mamba3LM(config)
    initialize(model, config, seed=1)
    with torch.device("meta"):  # as Lightning sets the GPU around building a model
        initialize(elsewhere, config, seed=1)
    for (name, a), b in zip(model.named_parameters(), elsewhere.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_initial_values():
    config = make_config(
        d_model=256, n_layers=4, layer_pattern="M*", mixer=MixerConfig(d_state=8, head_dim=8, rank=4), d_mlp=64
    )
    model = Mamba3LM(config)
    initialize(model, config, seed=0)
    mixer = model.layers[0].mixer
    dt = torch.nn.functional.softplus(mixer.dt_bias)
    assert dt.min() >= 0.99e-3
    assert dt.max() <= 0.101
    assert dt.log().std() > 1
    for ones in (mixer.B_bias, mixer.C_bias, mixer.D, mixer.mimo_z):
        assert torch.equal(ones, torch.ones_like(ones))
    for mean in (mixer.mimo_x, mixer.mimo_o):
        assert torch.equal(mean, torch.full((64, 4, 8), 0.25))
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert mixer.in_proj.weight.abs().max().item() == pytest.approx(1 / 16, rel=0.01)
    assert mixer.out_proj.weight.abs().max().item() == pytest.approx(1 / 512**0.5 / 2, rel=0.01)
    assert model.layers[0].mlp.fc2.weight.abs().max().item() == pytest.approx(1 / 8 / 2, rel=0.01)
    other = Mamba3LM(config)
    initialize(other, config, seed=1)
    assert not torch.equal(other.embedding.weight, model.embedding.weight)
    assert not torch.equal(model.layers[0].mixer.dt_bias, model.layers[2].mixer.dt_bias)


def test_a_parameter_without_a_rule_is_refused():
    config = make_config()
    model = Mamba3LM(config)
    model.extra = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="extra"):
        initialize(model, config, seed=0)


def test_roles_of_parameters():
    names = [name for name, _ in make_model(layer_pattern="M*", tie_embeddings=False).named_parameters()]
    decayed = {name.split(".", 2)[-1] if name.startswith("layers") else name for name in names if is_decayed(name)}
    assert decayed == {
        "embedding.weight",
        "lm_head.weight",
        "mixer.in_proj.weight",
        "mixer.qkv_proj.weight",
        "mixer.out_proj.weight",
        "mlp.fc1.weight",
        "mlp.fc2.weight",
    }
    assert {name for name in names if keeps_float32(name)} == set(names) - {n for n in names if is_decayed(n)}
    assert set(DYNAMICS) <= {name.rsplit(".", 1)[-1] for name in names}


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"layer_pattern": "MX"}, "layer_pattern"),
        ({"d_model": 15}, "model.d_model=15.*model.mixer.head_dim=8"),
        ({"mixer": MixerConfig(d_state=8, head_dim=8, groups=3)}, "model.mixer.groups=3"),
        ({"n_layers": 0}, "model.n_layers=0"),
    ],
)
def test_sizes_that_do_not_fit_are_named(settings, complaint):
    with pytest.raises(UserError, match=complaint):
        make_config(**settings)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: MixerConfig(rope_fraction=0.3), "rope_fraction=0.3 must be one of 0.5, 1.0"),
        (lambda: MixerConfig(a_activation="relu"), "heavy_tail, softplus"),
        (lambda: MixerConfig(rotation="rope"), "data_dependent"),
        (lambda: MixerConfig(dt_min=1.0), "dt_min"),
        (lambda: MixerConfig(d_state=2), "mixer.d_state=2"),
        (lambda: AttentionConfig(n_heads=6, n_kv_heads=4), "n_heads=6 is not a multiple"),
    ],
)
def test_bad_mixer_and_attention_settings(make, complaint):
    with pytest.raises(UserError, match=complaint):
        make()
