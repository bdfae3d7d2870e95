"""From packed rows to gradients through whole models: no document knows another, wherever the boundary lies."""

import numpy as np
import pytest
import torch

from mamba3_train.data.packing import Rows, pack, unpack
from mamba3_train.model import AttentionConfig, Mamba3Config, Mamba3LM, MixerConfig, initialize
from mamba3_train.training.loss import next_token_loss

LENGTH = 18
KINDS = {
    "siso": {"mixer": MixerConfig(d_state=8, head_dim=8)},
    "mimo": {"mixer": MixerConfig(d_state=8, head_dim=8, rank=2)},
    "hybrid": {
        "mixer": MixerConfig(d_state=8, head_dim=8),
        "layer_pattern": "M*",
        "attention": AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=8),
    },
}


def make_model(kind, dtype) -> Mamba3LM:
    config = Mamba3Config(vocab_size=40, d_model=16, n_layers=2, d_mlp=16, tie_embeddings=False, **KINDS[kind])
    model = Mamba3LM(config)
    initialize(model, config, seed=0)
    return model.to(dtype)


def rows_with_a_boundary_everywhere(seed=0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A row for each place where its second document may begin, as the loader hands them out; and these places."""
    begins = np.arange(1, LENGTH)
    tokens = np.random.default_rng(seed).integers(0, 40, (len(begins), LENGTH + 1)).astype("<u2")
    return unpack(pack(Rows(tokens, np.arange(len(begins)), begins))), torch.from_numpy(begins)


def loss(model, batch, chosen) -> torch.Tensor:
    """Loss of the chosen targets only."""
    return next_token_loss(model(batch["input_ids"], batch["document_ids"]), batch["labels"].masked_fill(~chosen, -100))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_each_document_alone(kind):
    model = make_model(kind, torch.float64)
    embedded = []
    model.embedding.register_forward_hook(lambda *call: embedded.append(call[-1]))
    batch, begins = rows_with_a_boundary_everywhere()
    first = torch.arange(LENGTH) < begins[:, None]
    for chosen in (first, ~first):
        (found,) = torch.autograd.grad(loss(model, batch, chosen), embedded.pop())
        assert (found[~chosen] == 0).all(), "not one bit goes across"
        for row, mine in enumerate(chosen):
            ids, labels = batch["input_ids"][row : row + 1, mine], batch["labels"][row : row + 1, mine]
            alone = next_token_loss(model(ids), labels)
            (expected,) = torch.autograd.grad(alone, embedded.pop())
            assert torch.allclose(found[row, mine], expected[0], rtol=1e-8, atol=1e-10)
            assert expected.abs().max() > 0 or mine.sum() == 1  # one token alone has no target of its own


@pytest.mark.parametrize("kind", KINDS)
def test_other_tokens_in_one_document_change_no_bit_of_another(kind):
    model = make_model(kind, torch.float32)
    batch, begins = rows_with_a_boundary_everywhere()
    first = torch.arange(LENGTH) < begins[:, None]
    for perturbed in (first, ~first):
        results = []
        for ids in (batch["input_ids"], torch.where(perturbed, (batch["input_ids"] + 11) % 40, batch["input_ids"])):
            model.zero_grad()
            found = loss(model, batch | {"input_ids": ids}, ~perturbed)
            found.backward()
            results.append([found.detach(), *(p.grad.clone() for p in model.layers.parameters())])
        assert results[0][0] > 0
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
