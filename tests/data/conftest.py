"""A small corpus of our own making, prepared once."""

import json
import random

import pytest

from mamba3_train.data.preparation import Preparation

WORDS = ["state", "angle", "rank", "scan", "chunk", "gate", "norm", "token", "row", "decay", "Ünïcode", "<|endoftext|>"]


@pytest.fixture(scope="session")
def make_documents():
    """A function that writes a jsonl file of distinct documents and returns their texts."""

    def make(path, count: int, seed: int = 0, longest: int = 120) -> list[str]:
        chance = random.Random(seed)
        texts = [
            f"{number} " + " ".join(chance.choices(WORDS, k=chance.randint(1, longest))) for number in range(count)
        ]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return texts

    return make


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, make_documents):
    """A prepared folder of about 40,000 tokens in several shards a split."""
    folder = tmp_path_factory.mktemp("corpus")
    make_documents(folder / "text.jsonl", 500)
    preparation = Preparation(
        source={"path": str(folder / "text.jsonl")},
        tokenizer={"train": {"vocab_size": 300}},
        validation_fraction=0.1,
        shard_tokens=10_000,
        workers=1,
    )
    preparation.run(folder / "shards")
    return folder / "shards"
