"""Tokens per second that one core turns into batches, from a corpus in the page cache.

python tools/benchmark_loader.py [--tokens 200_000_000] [--sequence-length 2048] [--workers 0]
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from mamba3_train.data.datamodule import TokenDataModule
from mamba3_train.data.shard_writer import ShardWriter, write_manifest
from mamba3_train.data.token_shards import Manifest


def synthetic_corpus(folder: Path, tokens: int, vocab_size: int = 128_256, mean_length: int = 800) -> None:
    """Write a corpus of random tokens in documents of geometric length."""
    chance = np.random.default_rng(0)
    writer = ShardWriter(folder, "synthetic", "train", np.dtype("<u4"), shard_tokens=1 << 27)
    while writer.tokens < tokens:
        lengths = chance.geometric(1 / mean_length, 10_000)
        writer.add(chance.integers(0, vocab_size, lengths.sum(), dtype=np.uint32), lengths)
    writer.close()
    write_manifest(
        folder,
        Manifest(
            dtype="uint32",
            vocab_size=vocab_size,
            end_of_document_id=0,
            tokenizer_fingerprint="",
            splits={"train": tuple(writer.shards), "validation": ()},
            preparation={},
        ),
    )


def main() -> None:
    """Make a corpus, read it once to warm the cache, then time the loader."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000_000, help="size of the corpus")
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=64, help="rows in one item of the loader")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        synthetic_corpus(Path(folder), options.tokens)
        data = TokenDataModule(
            path=folder,
            sequence_length=options.sequence_length,
            global_batch_size=options.batch,
            micro_batch_size=options.batch,
            num_workers=options.workers,
        )
        data.setup()
        data.total_steps = options.steps
        for shard in Path(folder).glob("*.bin"):
            shard.read_bytes()
        for name in ("first pass", "second pass"):
            start = time.perf_counter()
            tokens = sum(batch["input_ids"].numel() for batch in data.train_dataloader())
            seconds = time.perf_counter() - start
            print(f"{name}: {tokens / seconds / 1e6:.1f} M tokens/s ({options.workers} workers)")


if __name__ == "__main__":
    main()
