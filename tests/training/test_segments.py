"""Rows in segments: the loss of the whole row, and no document sees another across a segment's edge."""

import math
from types import SimpleNamespace

import pytest
import torch

from mamba3_train.errors import UserError
from mamba3_train.kernels import ScanState
from mamba3_train.model import Mamba3Config, Mamba3LM, MixerConfig, initialize
from mamba3_train.training.lightning_module import PretrainingModule
from mamba3_train.training.loss import IGNORED_LABEL, next_token_loss
from mamba3_train.training.segments import Segment, carried

KINDS = {"siso": MixerConfig(d_state=8, head_dim=8), "mimo": MixerConfig(d_state=8, head_dim=8, rank=2)}
ROWS, LENGTH, SEGMENT = 3, 24, 8


def module(mixer, segment_length=SEGMENT) -> PretrainingModule:
    """In double precision, with nothing of a Trainer but a strategy of one process."""
    config = Mamba3Config(vocab_size=40, d_model=16, n_layers=2, d_mlp=16, mixer=mixer)
    made = PretrainingModule(
        config,
        kernels="reference",
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.0),
        schedule=lambda step: 0.0,
        seed=0,
        micro_batch_size=2,
        gradient_clip_norm=1e9,
        segment_length=segment_length,
    )
    made.model = Mamba3LM(config)
    initialize(made.model, config, seed=0)
    made.model.double()
    made.trainer = SimpleNamespace(strategy=None)
    return made


def batch(*begins: list[int]) -> dict[str, torch.Tensor]:
    """Rows of random tokens; `begins` lists where documents begin inside each row."""
    tokens = torch.randint(0, 40, (len(begins), LENGTH + 1), generator=torch.Generator().manual_seed(1))
    opens = torch.zeros(len(begins), LENGTH + 1, dtype=torch.int32)
    for row, columns in enumerate(begins):
        opens[row, columns] = 1
    labels = tokens[:, 1:].masked_fill(opens[:, 1:] > 0, IGNORED_LABEL)
    return {"input_ids": tokens[:, :-1], "labels": labels, "document_ids": opens.cumsum(1)[:, :-1].int()}


def losses_and_gradients(made: PretrainingModule, rows: dict[str, torch.Tensor]):
    """Loss of every segment, as training computes them, and the gradient of their sum."""
    made.model.zero_grad()
    losses, state = [], None
    for segment in made._passes(rows):
        part, state = made._loss_sum(segment, state)
        part.backward()
        losses.append(part.detach())
    return torch.stack(losses), {name: p.grad.clone() for name, p in made.model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_whole_rows(kind):
    made, rows = module(KINDS[kind]), batch([], [5, 8, 21], [16, 17])
    losses, _ = losses_and_gradients(made, rows)
    assert len(losses) == 2 * LENGTH / SEGMENT, "three rows are two micro-batches"
    whole = next_token_loss(made.model(rows["input_ids"], rows["document_ids"]), rows["labels"])
    assert torch.allclose(losses.sum(), whole, rtol=1e-12)
    without = sum(
        next_token_loss(made.model(part["input_ids"], part["document_ids"]), part["labels"])
        for begin in range(0, LENGTH, SEGMENT)
        for part in [{key: value[:, begin : begin + SEGMENT] for key, value in rows.items()}]
    )
    assert not torch.allclose(without, whole, rtol=1e-6), "the state that is carried matters"


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_documents_within_segments_is_whole(kind):
    made = module(KINDS[kind])
    for begins, equal in (([8, 11, 16], True), ([7, 11, 16], False)):
        rows = batch(begins, [8, 16])
        _, gradients = losses_and_gradients(made, rows)
        made.model.zero_grad()
        next_token_loss(made.model(rows["input_ids"], rows["document_ids"]), rows["labels"]).backward()
        whole = {name: p.grad for name, p in made.model.named_parameters()}
        same = [torch.allclose(gradients[name], whole[name], rtol=1e-9, atol=1e-12) for name in whole]
        assert all(same) == equal, "gradients end at the edges of segments, and nowhere else"


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_that_begins_anywhere_sees_nothing_before_it(kind):
    """A row for every place where a document may begin; other tokens before it change no bit."""
    made = module(KINDS[kind])
    made.micro_batch_size = LENGTH
    begins = torch.arange(1, LENGTH)
    rows = batch(*([begin] for begin in begins.tolist()))
    before = torch.arange(LENGTH) < begins[:, None]
    rows["labels"][before] = IGNORED_LABEL
    losses, gradients = losses_and_gradients(made, rows)
    other = rows | {"input_ids": torch.where(before, (rows["input_ids"] + 7) % 40, rows["input_ids"])}
    losses_again, gradients_again = losses_and_gradients(made, other)
    assert torch.equal(losses, losses_again)
    assert losses.sum() > 0
    for name, gradient in gradients.items():
        if name != "embedding.weight":  # it adds zeros for other tokens, in another order
            assert torch.equal(gradient, gradients_again[name]), name
    assert torch.allclose(gradients["embedding.weight"], gradients_again["embedding.weight"], rtol=1e-12)


def test_attention_is_refused():
    config = Mamba3Config(vocab_size=40, d_model=16, n_layers=2, d_mlp=16, mixer=KINDS["siso"], layer_pattern="M*")
    with pytest.raises(UserError, match=r"data\.segment_length=8 .* model\.layer_pattern=M\*"):
        PretrainingModule(
            config, kernels="reference", optimizer=None, schedule=None, seed=0, micro_batch_size=1,
            gradient_clip_norm=1.0, segment_length=8,
        )  # fmt: skip


def test_what_a_document_left_does_not_matter_to_the_next():
    """Not even where it is not finite."""
    tokens = torch.zeros(2, 3)
    segment = Segment(tokens, tokens, tokens, continues=torch.tensor([True, False]), last=True)
    state = (ScanState(*(torch.tensor([[2.0], [value]]) for value in (math.nan, math.inf, -math.inf))),)
    (found,) = carried(state, segment)
    assert all(torch.equal(tensor, torch.tensor([[2.0], [0.0]])) for tensor in found)


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan")])
def test_a_norm_to_clip_to_must_be_above_zero(norm):
    config = Mamba3Config(vocab_size=40, d_model=16, n_layers=1, d_mlp=16, mixer=KINDS["siso"])
    with pytest.raises(UserError, match=r"trainer\.gradient_clip_norm=\S+ must be above 0; inf clips nothing"):
        PretrainingModule(
            config, kernels="reference", optimizer=None, schedule=None, seed=0, micro_batch_size=1,
            gradient_clip_norm=norm,
        )  # fmt: skip


def test_the_device_is_where_the_strategy_computes():
    """Lightning's own is that of the parameters, which FSDP may keep in host memory."""
    made = module(KINDS["siso"])
    made.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda", 1)))
    assert made.device == torch.device("cuda", 1)
