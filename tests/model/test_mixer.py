"""The mixer as a module: ablations, states, and what autocast may not touch."""

import pytest
import torch

from mamba3_train.kernels import StepState
from mamba3_train.kernels.inputs import Inputs
from mamba3_train.model import Mamba3Mixer, MixerConfig, initialize
from mamba3_train.model.config import Mamba3Config

SMALL = {"d_state": 8, "head_dim": 8}


def make_mixer(**settings):
    config = MixerConfig(**SMALL | settings)
    mixer = Mamba3Mixer(16, config)
    initialize(mixer, Mamba3Config(vocab_size=8, d_model=16, n_layers=2, d_mlp=0, mixer=config), seed=0)
    return mixer.double()


ABLATIONS = [
    {"trapezoid": False},
    {"rotation": "none"},
    {"rotation": "data_independent"},
    {"B_bias": False},
    {"C_bias": False},
    {"B_bias": False, "C_bias": False, "trapezoid": False, "rotation": "none"},
    {"a_activation": "softplus"},
    {"output_norm": True},
    {"rope_fraction": 1.0},
    {"groups": 2},
    {"rank": 3},
    {"rank": 2, "output_norm": True, "groups": 4},
]


@pytest.mark.parametrize("settings", ABLATIONS, ids=str)
def test_every_setting_trains_every_parameter(settings):
    mixer, u = make_mixer(**settings), torch.randn(2, 20, 16, dtype=torch.float64)
    y = mixer(u)
    assert y.shape == u.shape
    y.square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    # Causal: the last token reaches no earlier output.
    changed = u.clone()
    changed[:, -1] += 1
    assert torch.equal(mixer(changed)[:, :-1], y[:, :-1])
    if settings != {"rope_fraction": 1.0}:
        assert not torch.allclose(y, make_mixer()(u))


def test_the_scan_reads_the_projection_in_place(monkeypatch):
    """A rearranged projection would cost a copy of x and z in every layer, forward and backward."""
    given = {}

    def scan(x, *rest, **options):
        given.update(zip(Inputs._fields, (x, *rest, None, None, None), strict=True))
        return x

    monkeypatch.setattr("mamba3_train.model.mixer.mamba3_scan", scan)
    for u in (torch.randn(2, 20, 16), torch.randn(1, 7, 16)):
        make_mixer(rope_fraction=1.0).float()(u)
        readable = Inputs(**given).readable()
        assert readable.x.data_ptr() == given["x"].data_ptr()
        assert readable.z.data_ptr() == given["z"].data_ptr()


@pytest.mark.parametrize("settings", ABLATIONS, ids=str)
def test_token_by_token_equals_the_whole_row(settings):
    mixer, u = make_mixer(**settings), torch.randn(2, 9, 16, dtype=torch.float64)
    outputs, state = [], None
    for t in range(9):
        y, state = mixer(u[:, t : t + 1], state=state, return_state=True)
        outputs.append(y)
    assert torch.allclose(torch.cat(outputs, 1), mixer(u), rtol=1e-10, atol=1e-12)


def test_without_trapezoid_rotation_and_bias_it_is_the_plain_decaying_sum():
    """λ = 1, no rotation, no bias: h_t = exp(dt A) h_{t−1} + dt B x, the scalar state space of Mamba-2."""
    from mamba3_train.kernels import mamba3_scan
    from tests.scan_inputs import scan_inputs

    inputs = scan_inputs(rank=1, groups=4, norm=False) | dict.fromkeys(("trap", "angles", "B_bias", "C_bias", "z", "D"))
    x, B, C = inputs["x"], inputs["B"][:, :, 0], inputs["C"][:, :, 0]
    h, expected = torch.zeros(2, 4, 8, 16, dtype=torch.float64), []
    for t in range(x.shape[1]):
        dt = inputs["dt"][:, t, :, None, None]
        h = torch.exp(dt * inputs["A"][:, t, :, None, None]) * h + dt * x[:, t, :, :, None] * B[:, t, :, None, :]
        expected.append((h * C[:, t, :, None, :]).sum(-1))
    assert torch.allclose(mamba3_scan(**inputs), torch.stack(expected, 1), rtol=1e-10, atol=1e-12)


def test_heavy_tail_and_floor_of_the_decay():
    mixer = make_mixer()
    rate = mixer._decay_rate(torch.tensor([-1e9, -1.0, 0.0, 1.0, 3.0], dtype=torch.float64))
    assert rate.tolist() == [-1e-4, -0.5, -1.0, -2.0, -4.0]
    softplus = make_mixer(a_activation="softplus")._decay_rate(torch.zeros(1, dtype=torch.float64))
    assert softplus.item() == pytest.approx(-0.693147, abs=1e-6)


def test_autocast_leaves_step_sizes_and_decay_in_float32():
    mixer, u = make_mixer().float(), torch.randn(2, 20, 16)
    expected = mixer(u)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(u)
    assert y.dtype == torch.bfloat16
    assert mixer.dt_bias.dtype == torch.float32
    error = (y.float() - expected).norm() / expected.norm()
    assert 0 < error < 0.02


@pytest.mark.parametrize("settings", [{}, {"rank": 2, "output_norm": True}], ids=str)
def test_steps_in_place_equal_the_whole_row(settings):
    mixer, u = make_mixer(**settings), torch.randn(2, 9, 16, dtype=torch.float64)
    with torch.no_grad():
        expected, last = mixer(u, return_state=True)
        state, outputs = mixer.zero_state(2, torch.float64), []
        for t in range(9):
            y, same = mixer(u[:, t : t + 1], state=state, return_state=True)
            assert same is state
            outputs.append(y)
        assert torch.allclose(torch.cat(outputs, 1), expected, rtol=1e-10, atol=1e-12)
        assert all(torch.allclose(a, e, rtol=1e-10, atol=1e-12) for a, e in zip(state, last, strict=True))
        # What a scan leaves is copied: its own state stays as it was.
        y, after = mixer(u[:, :1], state=StepState.of(last), return_state=True)
        expected = mixer(u[:, :1], state=last)
        assert torch.allclose(y, expected, rtol=1e-10, atol=1e-12)
        assert not torch.allclose(after.ssm, last.ssm)
