"""Sampling: the prompt in one pass, then token by token with a state of fixed size."""

import torch
from torch import Tensor

from mamba3_train.model import Mamba3LM


@torch.no_grad()
def generate(
    model: Mamba3LM,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    end_id: int | None = None,
) -> Tensor:
    """Continue prompts.

    Args:
        prompt: (batch, tokens) int64.
        max_new_tokens: how many to add, at most.
        temperature: of the softmax; 0 takes the likeliest token.
        generator: source of randomness, on the prompt's device.
        end_id: stop when every sequence has produced it.

    Returns:
        (batch, tokens + new tokens).
    """
    logits, state = model(prompt, return_state=True)
    tokens, ended = [prompt], torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)
    for _ in range(max_new_tokens):
        # The entries that pad the vocabulary are no tokens.
        last = logits[:, -1, : model.config.vocab_size].float()
        if temperature == 0:
            next_token = last.argmax(-1, keepdim=True)
        else:
            next_token = torch.multinomial((last / temperature).softmax(-1), 1, generator=generator)
        tokens.append(next_token)
        if end_id is not None:
            ended |= next_token[:, 0] == end_id
            if bool(ended.all()):
                break
        logits, state = model(next_token, state=state, return_state=True)
    return torch.cat(tokens, dim=1)
