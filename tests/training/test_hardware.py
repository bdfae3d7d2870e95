"""Choices that depend on the device."""

import pytest
import torch

from mamba3_train.training.hardware import choose_compile, choose_precision, peak_flops


@pytest.mark.parametrize("gpu", [False, True])
def test_layers_are_compiled_where_it_pays(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert choose_compile("always", "auto")
    assert not choose_compile("never", "auto")
    assert choose_compile("gpu", "auto") is gpu
    assert not choose_compile("gpu", "cpu")


def test_precision_on_a_cpu():
    assert choose_precision("auto", "cpu") == "32-true"
    assert choose_precision("bf16-mixed", "cpu") == "bf16-mixed"


def test_an_unknown_gpu_has_no_peak():
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA Mystery 9000") is None
