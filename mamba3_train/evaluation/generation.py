"""Text from prompts: tokens are drawn until a document ends, a stop string appears or enough have come."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mamba3_train.errors import UserError
from mamba3_train.evaluation.decoding import Decoder
from mamba3_train.evaluation.sampling import Sampling, uniform_numbers
from mamba3_train.evaluation.text_stream import TextStream
from mamba3_train.model import Mamba3LM

FROM_THE_MODEL = Sampling()
"""Its own probabilities, unchanged."""


@dataclass(frozen=True)
class Continuation:
    """What came after a prompt.

    text: without the prompt, and without the stop string where one ended it.
    tokens: all that were drawn, the end-of-document token too.
    reason: `end_of_document`, `stop` or `length`.
    """

    text: str
    tokens: list[int]
    reason: str


@dataclass(frozen=True)
class Generation:
    """Continuations in the order of the prompts, and what they took.

    prompt_tokens, tokens: read and drawn, of all sequences; prefill_seconds, decode_seconds: for the one and the other.
    """

    continuations: list[Continuation]
    prompt_tokens: int
    tokens: int
    prefill_seconds: float
    decode_seconds: float


def generate(
    model: Mamba3LM,
    tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    sampling: Sampling = FROM_THE_MODEL,
    stop: Sequence[str] = (),
    seed: int = 0,
    cuda_graph: bool = False,
    ssm_dtype: torch.dtype | None = None,
    on_text: Callable[[int, str], None] = lambda row, text: None,
) -> Generation:
    """Continue prompts, all of them together.

    Args:
        model: in evaluation mode.
        tokenizer: `data.tokenizer.Tokenizer`.
        prompts: texts, each of at least one token.
        max_new_tokens: how many to draw for each, at most.
        sampling: how.
        stop: texts at whose first appearance a continuation ends; the prompt does not count.
        seed: prompt i draws with seed + i, so what it gets depends on no other.
        cuda_graph, ssm_dtype: see `Decoder`.
        on_text: called with a prompt's number and a piece of its continuation as soon as no stop string can take it
            back.

    Raises:
        UserError: no prompt, an empty one, or less than one token asked for.
    """
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    _check(encoded, max_new_tokens, stop)
    rows = [_Row(TextStream(tokenizer, ids, stop), tokenizer.end_of_document_id) for ids in encoded]

    begin = time.perf_counter()
    decoder = Decoder(model, encoded, max_new_tokens, cuda_graph, ssm_dtype)
    device = decoder.logits.device
    uniform = uniform_numbers(seed, len(rows), max_new_tokens).to(device)
    seen = _occurring(encoded, decoder.logits)
    _finish(device)
    read = time.perf_counter()
    for number in range(max_new_tokens):
        tokens = sampling.choose(decoder.logits, seen, uniform[:, number])
        seen.scatter_(1, tokens.unsqueeze(1), True)
        last = number == max_new_tokens - 1
        for index, token in enumerate(tokens.tolist()):
            if text := rows[index].add(token, last):
                on_text(index, text)
        if all(row.reason for row in rows):
            break
        decoder.step(tokens)
    _finish(device)
    return Generation(
        [Continuation(row.stream.text, row.tokens, row.reason) for row in rows],
        prompt_tokens=sum(map(len, encoded)),
        tokens=sum(len(row.tokens) for row in rows),
        prefill_seconds=read - begin,
        decode_seconds=time.perf_counter() - read,
    )


class _Row:
    """One continuation as it grows."""

    def __init__(self, stream: TextStream, end_of_document_id: int):
        self.stream, self._end_of_document_id = stream, end_of_document_id
        self.tokens: list[int] = []
        self.reason: str | None = None

    def add(self, token: int, last: bool) -> str:
        """Take a token, the last one that there may be or not; returns what text can be shown. Nothing once ended."""
        if self.reason is not None:
            return ""
        self.tokens.append(token)
        if token == self._end_of_document_id:
            self.reason = "end_of_document"
            return self.stream.end()
        text = self.stream.add(token)
        if self.stream.stopped:
            self.reason = "stop"
        elif last:
            self.reason = "length"
            text += self.stream.end()
        return text


def _check(encoded: list[list[int]], max_new_tokens: int, stop: Sequence[str]) -> None:
    if not encoded:
        raise UserError("there is no prompt: give prompt=TEXT, or prompts in a file")
    for number, ids in enumerate(encoded, start=1):
        if not ids:
            raise UserError(f"prompt {number} is empty: a model goes on from at least one token")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if "" in stop:
        raise UserError("an empty stop string would end every text before it begins")


def _occurring(encoded: list[list[int]], logits: torch.Tensor) -> torch.Tensor:
    """(batch, vocabulary) bool: which tokens each prompt has."""
    seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    for row, ids in enumerate(encoded):
        seen[row, torch.tensor(ids, device=logits.device)] = True
    return seen


def _finish(device: torch.device) -> None:
    """Wait for a GPU, so that a clock read next counts its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
