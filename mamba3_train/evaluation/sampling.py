"""Which token comes next: logits → penalty → temperature → top-k → top-p → min-p → a draw.

Names, meanings and order are those of transformers' `generate`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mamba3_train.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Raises:
        UserError: a value that has no meaning.
    """

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token and draws nothing."""
    top_k: int = 0
    """Keep the k likeliest tokens, and what ties with the last of them; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens until their probabilities reach p."""
    min_p: float = 0.0
    """Keep tokens at least so likely as this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Tokens of the prompt or of what followed it: positive logits are divided by it, negative ones multiplied."""

    def __post_init__(self):
        for key, least, most in (
            ("temperature", 0.0, math.inf),
            ("top_k", 0, math.inf),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 0.0, math.inf),
        ):
            if not least <= getattr(self, key) <= most:
                raise UserError(f"{key}={getattr(self, key)} must be between {least} and {most}")
        if self.repetition_penalty == 0:
            raise UserError("repetition_penalty=0 would divide by zero: use 1 for no penalty")

    def choose(self, logits: Tensor, seen: Tensor | None, uniform: Tensor) -> Tensor:
        """The next token of every sequence.

        Args:
            logits: (batch, vocabulary), float32 or wider.
            seen: (batch, vocabulary) bool, tokens that occurred; only the repetition penalty asks.
            uniform: (batch,) float64, drawn from [0, 1): decides each row's token.

        Returns:
            (batch,) int64.
        """
        if self.repetition_penalty != 1:
            penalised = torch.where(logits < 0, logits * self.repetition_penalty, logits / self.repetition_penalty)
            logits = torch.where(seen, penalised, logits)
        if self.temperature == 0:
            return logits.argmax(-1)
        probabilities = self.filtered(logits / self.temperature).double().softmax(-1)
        # The first token at which the sum of probabilities exceeds the number drawn.
        sums = probabilities.cumsum(-1)
        drawn = torch.searchsorted(sums, uniform.unsqueeze(-1) * sums[:, -1:], right=True)
        return drawn.squeeze(-1).clamp(max=logits.shape[-1] - 1)

    def filtered(self, logits: Tensor) -> Tensor:
        """Logits after temperature, −∞ where top_k, top_p or min_p leaves a token out; the likeliest always stays."""
        if 0 < self.top_k < logits.shape[-1]:
            last = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < last, -math.inf)
        if self.top_p < 1:
            ordered, index = logits.sort(descending=True, stable=True)
            probabilities = ordered.softmax(-1)
            likelier = probabilities.cumsum(-1) - probabilities
            left_out = likelier >= self.top_p
            left_out[:, 0] = False
            logits = logits.masked_fill(left_out.scatter(-1, index, left_out), -math.inf)
        if self.min_p > 0:
            probabilities = logits.softmax(-1)
            likeliest = probabilities.amax(-1, keepdim=True)
            logits = logits.masked_fill(probabilities < self.min_p * likeliest, -math.inf)
        return logits


def uniform_numbers(seed: int, rows: int, length: int) -> Tensor:
    """(rows, length) float64 in [0, 1), on the CPU: row i depends on seed + i alone, not on its neighbours."""
    generators = (torch.Generator().manual_seed(seed + row) for row in range(rows))
    return torch.stack([torch.rand(length, dtype=torch.float64, generator=generator) for generator in generators])
