"""A model that cannot learn one batch by heart has a broken gradient somewhere."""

import pytest
import torch

from mamba3_train.model import AttentionConfig, Mamba3Config, Mamba3LM, MixerConfig, initialize
from mamba3_train.training.loss import IGNORED_LABEL, count_targets, next_token_loss
from mamba3_train.training.optimizer import adamw

KINDS = {
    "siso": {"mixer": MixerConfig(d_state=16, head_dim=16)},
    "mimo": {"mixer": MixerConfig(d_state=16, head_dim=16, rank=2)},
    "hybrid": {"mixer": MixerConfig(d_state=16, head_dim=16, output_norm=True), "layer_pattern": "M*"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_300_steps_on_one_batch_go_below_a_tenth_of_a_nat(kind):
    attention = AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=16)
    config = Mamba3Config(vocab_size=64, d_model=32, n_layers=2, d_mlp=64, attention=attention, **KINDS[kind])
    model = Mamba3LM(config)
    initialize(model, config, seed=0)
    optimizer = adamw(model, lr=1e-2, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.0)
    tokens = torch.randint(0, 64, (4, 33))
    documents = (torch.arange(32) >= 20).int().expand(4, 32)
    losses = []
    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 300)
        loss = next_token_loss(model(tokens[:, :-1], documents), tokens[:, 1:]) / (4 * 32)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 4.0, "about ln 64 before training"
    # The first token of a document is all there is to tell eight sequences apart.
    assert losses[-1] < 0.1


def test_loss_counts_only_targets():
    logits, labels = torch.randn(2, 3, 7), torch.tensor([[1, IGNORED_LABEL, 2], [IGNORED_LABEL, 0, 6]])
    by_hand = -sum(logits[i, j].log_softmax(-1)[labels[i, j]] for i, j in ((0, 0), (0, 2), (1, 1), (1, 2)))
    assert count_targets(labels) == 4
    assert torch.allclose(next_token_loss(logits, labels), by_hand)
    assert next_token_loss(logits.bfloat16(), labels).dtype == torch.float32
    assert next_token_loss(logits, torch.full_like(labels, IGNORED_LABEL)) == 0
