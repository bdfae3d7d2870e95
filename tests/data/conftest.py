"""A small corpus of our own making, prepared once."""

import json
import random

import pytest

from mamba3_train.data.preparation import Preparation

WORDS = [
    "state",
    "angle",
    "rank",
    "scan",
    "chunk",
    "gate",
    "norm",
    "token",
    "shard",
    "row",
    "decay",
    "Ünïcode",
    "<|endoftext|>",
]


def write_documents(path, count: int, seed: int = 0, longest: int = 120) -> list[str]:
    """Write a jsonl file of documents and return their texts."""
    chance = random.Random(seed)
    texts = [f"{number} " + " ".join(chance.choices(WORDS, k=chance.randint(1, longest))) for number in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A prepared folder of about 40,000 tokens in several shards a split."""
    folder = tmp_path_factory.mktemp("corpus")
    write_documents(folder / "text.jsonl", 500)
    preparation = Preparation(
        source={"path": str(folder / "text.jsonl")},
        tokenizer={"train": {"vocab_size": 300}},
        validation_fraction=0.1,
        shard_tokens=10_000,
    )
    preparation.run(folder / "shards")
    return folder / "shards"
