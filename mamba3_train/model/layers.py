"""The small layers: embedding and MLP. The norm is torch's own RMSNorm."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba3_train.kernels.linear_cross_entropy import linear_cross_entropy


class TokenEmbedding(nn.Module):
    """Token ids to vectors, and with `unembed` vectors to logits, or to their loss, by the same weight.

    All goes through `forward`, so that engines which gather a module's weights around its call see every use.
    """

    def __init__(self, vocab_size: int, d_model: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))

    def forward(
        self, tokens: Tensor, unembed: bool = False, labels: Tensor | None = None, kernels: str = "auto"
    ) -> Tensor:
        """(…) ids → (…, d_model); unembed: (…, d_model) → (…, vocab_size), or with labels (…) their summed loss."""
        if not unembed:
            return F.embedding(tokens, self.weight)
        return head(tokens, self.weight, labels, kernels)


class Unembedding(nn.Linear):
    """Vectors to logits, or to their loss, by a weight of its own."""

    def __init__(self, d_model: int, vocab_size: int):
        super().__init__(d_model, vocab_size, bias=False)

    def forward(self, hidden: Tensor, labels: Tensor | None = None, kernels: str = "auto") -> Tensor:
        """(…, d_model) → (…, vocab_size), or with labels (…) their summed loss."""
        return head(hidden, self.weight, labels, kernels)


def head(hidden: Tensor, weight: Tensor, labels: Tensor | None, kernels: str) -> Tensor:
    """Logits, or with labels the sum of their cross-entropies."""
    return F.linear(hidden, weight) if labels is None else linear_cross_entropy(hidden, weight, labels, kernels)


class SwiGLU(nn.Module):
    """fc2(u · SiLU(gate)) with [u | gate] = fc1(x), no biases."""

    def __init__(self, d_model: int, d_mlp: int):
        super().__init__()
        self.fc1 = nn.Linear(d_model, 2 * d_mlp, bias=False)
        self.fc2 = nn.Linear(d_mlp, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, d_model) → (…, d_model)."""
        u, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(u * F.silu(gate))
