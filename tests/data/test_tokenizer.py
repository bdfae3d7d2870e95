"""The tokenizer: every text comes back as it was, and only documents' ends carry the end-of-document id."""

import pytest

from mamba3_train.data.tokenizer import Tokenizer
from mamba3_train.errors import UserError

TEXTS = [
    "def f(x):\n\treturn x  # Ünïcode ☃ 漢字\n",
    "  spaces  and\r\nlines\n\n\n",
    "\x00 control \x7f",
    "<|endoftext|> quoted",
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS * 3, 300)


def test_texts_come_back(tokenizer):
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_only_ends_of_documents_carry_the_id(tokenizer):
    for ids in tokenizer.encode_documents(TEXTS):
        assert ids[-1] == tokenizer.end_of_document_id
        assert tokenizer.end_of_document_id not in ids[:-1]


def test_vocabulary_has_the_size_asked_for(tokenizer):
    assert tokenizer.vocab_size == 300
    assert max(max(ids) for ids in tokenizer.encode_documents(TEXTS)) < 300


def test_training_is_repeatable(tokenizer):
    assert Tokenizer.train(TEXTS * 3, 300).fingerprint == tokenizer.fingerprint
    assert Tokenizer.train(TEXTS * 3, 299).fingerprint != tokenizer.fingerprint


def test_saved_and_read(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    for read in (Tokenizer.from_file(tmp_path), Tokenizer.of_corpus(tmp_path, tokenizer.end_of_document_id)):
        assert read.fingerprint == tokenizer.fingerprint
        assert list(read.encode_documents(TEXTS)) == list(tokenizer.encode_documents(TEXTS))


def test_mistakes_are_explained(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"looked for <stop>; .*tokenizer\.end_of_document"):
        Tokenizer(tokenizer.backend, "<stop>")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer"):
        Tokenizer.from_file(tmp_path)
