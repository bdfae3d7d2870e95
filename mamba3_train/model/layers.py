"""The small layers: embedding and MLP. The norm is torch's own RMSNorm."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenEmbedding(nn.Module):
    """Token ids to vectors, and with `unembed` vectors to logits by the same weight.

    Both directions go through `forward`, so that engines which gather a module's weights around its call see both.
    """

    def __init__(self, vocab_size: int, d_model: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))

    def forward(self, tokens: Tensor, unembed: bool = False) -> Tensor:
        """(…) ids → (…, d_model); unembed: (…, d_model) → (…, vocab_size)."""
        return F.linear(tokens, self.weight) if unembed else F.embedding(tokens, self.weight)


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
