"""Loss, perplexity and bits per byte against sums by hand; bytes of tokens against the text itself."""

import math

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from mamba3_train.data.token_bytes import token_bytes
from mamba3_train.data.tokenizer import Tokenizer
from mamba3_train.evaluation.perplexity import Likelihood, likelihood
from tests.small_run import make_config, make_model, tokenizer

TEXTS = ["the state", "naïve café — 東京 🙂🙂 \t\n  end", "", "a <|endoftext|> that is quoted", "\x00\x7f\u200b"]


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_tokens_are_the_texts(text):
    sizes = token_bytes(tokenizer())
    ids = tokenizer().encode(text)
    assert sizes[ids].sum() == len(text.encode())
    assert sizes[tokenizer().end_of_document_id] == 0
    assert len(sizes) == tokenizer().vocab_size


def test_a_vocabulary_of_another_kind_has_no_bytes_of_its_own():
    backend = Backend(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["</s>"])
    assert token_bytes(Tokenizer(backend)) is None
    assert Likelihood(2.0, 4, None).bits_per_byte is None


def test_sums_are_those_by_hand():
    model = make_model(make_config("M*"))
    sizes = torch.from_numpy(token_bytes(tokenizer()))
    generator = torch.Generator().manual_seed(1)
    batches = []
    for rows in (2, 3, 1):
        labels = torch.randint(1, 270, (rows, 9), generator=generator)
        labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
        documents = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2]).expand(rows, 9).int()
        batches.append({"input_ids": torch.randint(0, 270, (rows, 9)), "labels": labels, "document_ids": documents})
    batches[2]["labels"][:] = -100
    nats, targets, size = 0.0, 0, 0
    for batch in batches[:2]:
        for ids, labels, documents in zip(*(batch[k] for k in ("input_ids", "labels", "document_ids")), strict=True):
            for begin, end in ((0, 3), (3, 7), (7, 9)):  # each document alone
                assert documents[begin:end].unique().numel() == 1
                log_probabilities = model(ids[None, begin:end])[0].log_softmax(-1)
                for i, label in enumerate(labels[begin:end].tolist()):
                    if label != -100:
                        nats -= float(log_probabilities[i, label])
                        targets += 1
                        size += len(tokenizer().backend.id_to_token(label)) if label else 0
    found = likelihood(model, batches, sizes, torch.device("cpu"))
    assert (found.targets, found.bytes) == (targets, size)
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats / targets), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)
