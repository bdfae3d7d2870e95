"""Golden vectors of the public model: outputs, input gradients, parameter gradients, logits, and the way back."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mamba3_train.checkpoint.official_mamba import (
    _mixer_to_official,
    load_official,
    mixer_from_official,
    save_official,
)
from mamba3_train.errors import UserError
from mamba3_train.model import Mamba3Config, Mamba3LM, MixerConfig, initialize

GOLDEN = Path(__file__).parents[1] / "golden"
MIXERS = sorted(path.name for path in GOLDEN.glob("mixer_*.safetensors"))
MODELS = sorted(path.name for path in GOLDEN.glob("official_lm_*"))


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def read_mixer(name):
    with safe_open(GOLDEN / name, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        return json.loads(file.metadata()["config"]), tensors


@pytest.mark.parametrize("backend", ["reference", "recurrent"])
@pytest.mark.parametrize("name", MIXERS)
def test_mixer_equals_the_public_one(name, backend):
    config, golden = read_mixer(name)
    parameters = {key.removeprefix("param."): t for key, t in golden.items() if key.startswith("param.")}
    mixer = mixer_from_official(config, parameters, kernels=backend)
    u = golden["u"].clone().requires_grad_()
    y = mixer(u)
    assert relative(y, golden["y"]) < 1e-9
    y.backward(golden["dy"])
    assert relative(u.grad, golden["du"]) < 1e-9
    gradients = _mixer_to_official({n: p.grad for n, p in mixer.named_parameters()}, mixer)
    assert gradients.keys() == parameters.keys()
    for key, gradient in gradients.items():
        assert relative(gradient, golden[f"grad.{key}"]) < 1e-9, key


def test_mixers_were_found():
    assert len(MIXERS) == 4
    assert len(MODELS) == 2


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_public_model(name):
    expected = load_file(GOLDEN / name / "expected.safetensors")
    model = load_official(GOLDEN / name)
    assert (model.double()(expected["input_ids"]) - expected["logits"]).abs().max() < 1e-9
    assert (load_official(GOLDEN / name)(expected["input_ids"]) - expected["logits"]).abs().max() < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_saved_models_load_back_identically(name, tmp_path):
    model = load_official(GOLDEN / name)
    save_official(model, tmp_path)
    again = load_official(tmp_path)
    assert again.config == model.config
    for (key, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    # Nothing but the permutation and the names was touched: the weights are those of the public file.
    before = torch.load(GOLDEN / name / "pytorch_model.bin", weights_only=True)
    after = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    "mixer", [MixerConfig(d_state=8, head_dim=8, a_activation="softplus"), MixerConfig(d_state=8, head_dim=8, rank=2)]
)
def test_own_models_survive_the_public_format(mixer, tmp_path):
    config = Mamba3Config(vocab_size=30, d_model=16, n_layers=2, d_mlp=20, mixer=mixer, tie_embeddings=False)
    model = Mamba3LM(config)
    initialize(model, config, seed=0)
    save_official(model, tmp_path)
    again = load_official(tmp_path)
    assert again.config == config
    ids = torch.randint(0, 30, (1, 10))
    assert torch.equal(again(ids), model(ids))


def test_safetensors_are_read(tmp_path):
    shutil.copy(GOLDEN / MODELS[0] / "config.json", tmp_path)
    weights = torch.load(GOLDEN / MODELS[0] / "pytorch_model.bin", weights_only=True)
    weights.pop("lm_head.weight")  # tied; safetensors refuses shared memory
    save_file(weights, tmp_path / "model.safetensors")
    ids = torch.randint(0, 200, (1, 10))
    assert torch.equal(load_official(tmp_path)(ids), load_official(GOLDEN / MODELS[0])(ids))


class Dangerous:
    def __reduce__(self):
        return (print, ("unpickled",))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda f, c, w: (f / "config.json").unlink(), "config.json does not exist"),
        (lambda f, c, w: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f, c, w: (f / "pytorch_model.bin").unlink(), "neither model.safetensors nor"),
        (lambda f, c, w: (f / "pytorch_model.bin").write_bytes(b"PK"), "cannot be read"),
        (lambda f, c, w: torch.save(Dangerous(), f / "pytorch_model.bin"), "cannot be read"),
        (lambda f, c, w: c["ssm_cfg"].update(layer="Mamba2"), "Mamba2"),
        (lambda f, c, w: c["ssm_cfg"].update(conv_size=4), "conv_size"),
        (lambda f, c, w: c.update(attn_layer_idx=[1]), "attn_layer_idx"),
        (lambda f, c, w: c.update(n_layer=2), "unexpected .'layers.2"),
        (lambda f, c, w: c.update(d_model=128), "has shape"),
        (lambda f, c, w: w.pop("backbone.norm_f.weight"), "missing .'norm.weight"),
    ],
)
def test_damaged_folders_get_one_clear_line(damage, complaint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / MODELS[0], folder)
    config = json.loads((folder / "config.json").read_text())
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    names, text = list(weights), json.dumps(config)
    damage(folder, config, weights)
    if json.dumps(config) != text:
        (folder / "config.json").write_text(json.dumps(config))
    if list(weights) != names:
        torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=complaint) as caught:
        load_official(folder)
    assert "\n" not in str(caught.value)


def test_what_has_no_public_counterpart_is_refused(tmp_path):
    def make(**settings):
        base = {"vocab_size": 30, "d_model": 64, "n_layers": 2, "d_mlp": 20, "mixer": MixerConfig(d_state=8)}
        with torch.device("meta"):
            return Mamba3LM(Mamba3Config(**base | settings))

    with pytest.raises(UserError, match="attention"):
        save_official(make(layer_pattern="M*"), tmp_path)
    with pytest.raises(UserError, match="ablated"):
        save_official(make(mixer=MixerConfig(d_state=8, trapezoid=False)), tmp_path)
    assert not list(tmp_path.iterdir())
