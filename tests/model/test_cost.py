"""Counted cost against the built model and against a count of its operations."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mamba3_train.errors import UserError
from mamba3_train.model import AttentionConfig, Mamba3Config, Mamba3LM, MixerConfig, initialize
from mamba3_train.model.cost import (
    attention_flops_per_token,
    mlp_width_matching_siso,
    model_cost,
    scan_flops_per_token,
    state_bytes,
)

CONFIGS = [
    {},
    {"mixer": MixerConfig(d_state=16, head_dim=8, rank=4, groups=2, output_norm=True)},
    {"mixer": MixerConfig(d_state=16, head_dim=8, trapezoid=False, rotation="none", B_bias=False)},
    {"mixer": MixerConfig(d_state=16, head_dim=8, rotation="data_independent", rope_fraction=1.0, C_bias=False)},
    {"layer_pattern": "MM*", "attention": AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=8)},
    {"layer_pattern": "*", "tie_embeddings": False, "attention": AttentionConfig(n_heads=4, n_kv_heads=1, head_dim=8)},
    {"d_mlp": 0},
]


def make_config(**settings):
    mixer = MixerConfig(d_state=16, head_dim=8)
    return Mamba3Config(**{"vocab_size": 50, "d_model": 32, "n_layers": 4, "d_mlp": 40, "mixer": mixer} | settings)


@pytest.mark.parametrize("settings", CONFIGS, ids=str)
def test_parameters_equal_the_built_model(settings):
    config = make_config(**settings)
    with torch.device("meta"):
        model = Mamba3LM(config)
    cost = model_cost(config, seqlen=64)
    assert cost.total_parameters == sum(p.numel() for p in model.parameters())
    mixers = sum(p.numel() for n, p in model.named_parameters() if ".mixer." in n)
    assert cost.parameters["mixers"] + cost.parameters["attention"] == mixers
    assert cost.parameters["mlp"] == sum(p.numel() for n, p in model.named_parameters() if ".mlp." in n)


@pytest.mark.parametrize("rank", [1, 2])
def test_flops_equal_a_count_of_the_products(rank):
    """The chunked form does the counted products: intra-chunk scores and values, states in, states out."""
    config = make_config(mixer=MixerConfig(d_state=16, head_dim=8, rank=rank))
    model = Mamba3LM(config)
    initialize(model, config, seed=0)
    ids = torch.randint(0, 50, (1, 256))
    with FlopCounterMode(display=False) as forward:
        logits = model(ids)
    cost = model_cost(config, seqlen=256)
    assert forward.get_total_flops() / 256 == pytest.approx(cost.forward_flops_per_token, rel=1e-6)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    assert (backward.get_total_flops() + forward.get_total_flops()) / 256 == pytest.approx(
        cost.training_flops_per_token, rel=1e-6
    )


def test_scan_flops_by_hand():
    """At N = 128, P = 64: 2 · 64 · 192 + 4 · 128 · 64 = 57,344 a token and head; MIMO rank 4 costs four times that."""
    assert scan_flops_per_token(MixerConfig(d_state=128, head_dim=64)) == 57_344
    assert scan_flops_per_token(MixerConfig(d_state=128, head_dim=64, rank=4)) == 229_376


def test_attention_flops_by_hand():
    """Token t of T sees t keys: 4 · heads · width · t FLOPs, on average (T + 1) / 2 keys."""
    config = make_config(layer_pattern="*", attention=AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=8))
    by_hand = sum(4 * 4 * 8 * t for t in range(1, 65)) / 64
    assert attention_flops_per_token(config, 64) == by_hand
    assert model_cost(config, 64).forward_flops["attention"] == 4 * by_hand


def test_state_bytes_equal_the_states():
    config = make_config(
        layer_pattern="MM*",
        mixer=MixerConfig(d_state=16, head_dim=8, rank=2),
        attention=AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=8),
    )
    model = Mamba3LM(config)
    initialize(model, config, seed=0)
    _, state = model(torch.randint(0, 50, (1, 30)), return_state=True)
    assert state_bytes(config, tokens=30, element_bytes=4) == sum(t.nbytes for layer in state for t in layer)
    # The SSM states stay float32 in half precision.
    ssm = sum(layer.ssm.nbytes for layer in state if hasattr(layer, "ssm"))
    other = sum(t.nbytes for layer in state for t in layer if t.is_floating_point()) - ssm
    assert state_bytes(config, tokens=30) == ssm + other // 2 + 30


@pytest.mark.parametrize(
    ("d_model", "siso", "mimo"), [(768, 1536, 1264), (1024, 2048, 1776), (1536, 3072, 2800), (2048, 4096, 3824)]
)
def test_mlp_width_that_makes_mimo_as_large_as_siso(d_model, siso, mimo):
    assert mlp_width_matching_siso(d_model, siso, MixerConfig(rank=4)) == mimo
    counts = [
        model_cost(Mamba3Config(vocab_size=8, d_model=d_model, n_layers=2, d_mlp=width, mixer=mixer), 1)
        for width, mixer in ((siso, MixerConfig()), (mimo, MixerConfig(rank=4)))
    ]
    assert counts[0].total_parameters == counts[1].total_parameters


def test_no_exact_mlp_width_is_said():
    with pytest.raises(UserError, match="no MLP width"):
        mlp_width_matching_siso(32, 64, MixerConfig(d_state=16, head_dim=8, rank=3))
