"""The fused head and loss equal the plain ones, value and gradients."""

import pytest
import torch

from mamba3_train.kernels import linear_cross_entropy as module
from mamba3_train.kernels.linear_cross_entropy import IGNORED_LABEL, linear_cross_entropy


def run(backend, device="cpu", tokens=13, vocabulary=37, width=16, labels=None, scale=1.0, precision=None):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, tokens, width, generator=generator).to(device).requires_grad_()
    weight = (scale * torch.randn(vocabulary, width, generator=generator)).to(device).requires_grad_()
    if labels is None:
        labels = torch.randint(0, vocabulary, (2, tokens), generator=generator)
        labels[0, 3:5] = IGNORED_LABEL
    with torch.autocast(device, dtype=precision or torch.bfloat16, enabled=precision is not None):
        loss = linear_cross_entropy(hidden, weight, labels.to(device), backend)
    (loss / 7).backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize("vocabulary", [37, 4096, 5000])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_value_and_gradients(vocabulary, scale, monkeypatch):
    """Several blocks of rows and of columns, the last ones ragged; large logits."""
    monkeypatch.setattr(module, "ROWS", 8)
    for found, expected in zip(
        run("triton", vocabulary=vocabulary, scale=scale),
        run("reference", vocabulary=vocabulary, scale=scale),
        strict=True,
    ):
        assert found.dtype == expected.dtype == torch.float32
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_nothing_to_predict():
    loss, d_hidden, d_weight = run("triton", labels=torch.full((2, 13), IGNORED_LABEL))
    assert loss == 0
    assert not d_hidden.any()
    assert not d_weight.any()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_without_gradients_the_value_alone():
    with torch.no_grad():
        hidden, weight = torch.randn(5, 8), torch.randn(11, 8)
        labels = torch.arange(5)
        found = linear_cross_entropy(hidden, weight, labels, "triton")
        assert torch.allclose(found, linear_cross_entropy(hidden, weight, labels, "reference"))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
def test_value_and_gradients_on_a_gpu(precision):
    """Against float32 of plain PyTorch; with 16 bit the logits' rounding is all the difference."""
    sizes = {"device": "cuda", "tokens": 5000, "vocabulary": 50_257, "width": 256, "scale": 0.05}
    for found, expected in zip(run("triton", precision=precision, **sizes), run("reference", **sizes), strict=True):
        error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert error < (1e-5 if precision is None else 5e-3)
