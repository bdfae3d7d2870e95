"""The model token by token: prompts in one pass, then a step a token in memory that stays the same."""

import torch
from torch import Tensor

from mamba3_train.model import Mamba3LM
from mamba3_train.model.recurrent_state import RecurrentState, with_room


class Decoder:
    """Sequences that a model has read and goes on with, a token of each at a time.

    All buffers are allocated here and keep their place: the state of Mamba-3 layers has a fixed size, the keys and
    values of attention layers have room for `room` tokens more.

    Args:
        model: in evaluation mode.
        prompts: token ids; their lengths may differ.
        room: how many steps will be taken at most.
        cuda_graph: record the step once and replay it, which spares the time of launching its kernels one by one; on a
            CPU it changes nothing.
        ssm_dtype: what the states of Mamba-3 layers are stored in, float32 or wider (None) or bfloat16.

    `logits` (batch, vocabulary without padding), float32 or wider, are those of the next token; a step changes them.
    """

    def __init__(
        self,
        model: Mamba3LM,
        prompts: list[list[int]],
        room: int,
        cuda_graph: bool = False,
        ssm_dtype: torch.dtype | None = None,
    ):
        self._model = model
        logits, state = prefill(model, prompts)
        device = logits.device  # weights may rest elsewhere
        self.state = with_room(state, room, ssm_dtype)
        self._tokens = torch.zeros(len(prompts), 1, dtype=torch.int64, device=device)
        self._logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        self._graph = self._recorded() if cuda_graph and device.type == "cuda" else None

    @property
    def logits(self) -> Tensor:
        """Of the next token, without the entries that pad the vocabulary: they are no tokens."""
        return self._logits[:, : self._model.config.vocab_size]

    @torch.no_grad()
    def step(self, tokens: Tensor) -> None:
        """Take the next token of every sequence, (batch,)."""
        self._tokens.copy_(tokens.unsqueeze(1))
        if self._graph is None:
            self._advance()
        else:
            self._graph.replay()

    def _advance(self) -> None:
        """One step from the token buffer to the logits, the state changed in place."""
        self._logits.copy_(self._model(self._tokens, state=self.state)[:, -1])

    @torch.no_grad()
    def _recorded(self) -> torch.cuda.CUDAGraph:
        """The step as a CUDA graph over the buffers, which are afterwards as before."""
        before = [tensor.clone() for tensor in (*_tensors(self.state), self._logits)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._advance()  # compiles kernels and fills caches, which a recording must not do
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._advance()
        for tensor, value in zip((*_tensors(self.state), self._logits), before, strict=True):
            tensor.copy_(value)
        return graph


@torch.no_grad()
def prefill(model: Mamba3LM, prompts: list[list[int]]) -> tuple[Tensor, RecurrentState]:
    """Read prompts in one pass: logits (batch, padded vocabulary) after the last token of each, and the state there.

    Shorter prompts are filled up on the left by a document of its own, which the prompt does not see: what comes out
    of a row is what it would be alone.
    """
    device, longest = model.embedding.weight.device, max(map(len, prompts))
    filling = [longest - len(prompt) for prompt in prompts]
    rows = [[0] * missing + prompt for missing, prompt in zip(filling, prompts, strict=True)]
    documents = None
    if any(filling):
        column = torch.arange(longest, device=device)
        documents = (column >= torch.tensor(filling, device=device).unsqueeze(1)).to(torch.int32)
    ids = torch.tensor(rows, dtype=torch.int64, device=device)
    logits, state = model(ids, document_ids=documents, return_state=True, last_only=True)
    return logits[:, -1], state


def state_bytes(state: RecurrentState) -> int:
    """Memory of a state."""
    return sum(tensor.nbytes for tensor in _tensors(state))


def _tensors(state: RecurrentState) -> list[Tensor]:
    return [tensor for layer in state for tensor in layer]
