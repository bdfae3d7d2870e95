"""Tokens per second that the loader hands out, and that one core of it makes, from a corpus in the page cache.

python tools/benchmark_loader.py [--workers 0 1] [--vocab-size 128256] [--output docs/results/benchmark_loader_cpu.json]

CPU seconds are those of the process that receives and of its workers together. Unpacking is not in them: it is done on
the training device, and timed here by itself on one core.
"""

import argparse
import json
import os
import platform
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from mamba3_train.data.best_fit import write_plans
from mamba3_train.data.datamodule import TokenDataModule
from mamba3_train.data.packing import unpack
from mamba3_train.data.shard_writer import ShardWriter, write_manifest
from mamba3_train.data.token_shards import Manifest, token_dtype


def synthetic_corpus(folder: Path, tokens: int, vocab_size: int, mean_length: int = 800) -> None:
    """Write a corpus of random tokens in documents of geometric length."""
    chance = np.random.default_rng(0)
    dtype = token_dtype(vocab_size)
    writer = ShardWriter(folder, "synthetic", "train", dtype, shard_tokens=1 << 25)
    while writer.tokens < tokens:
        lengths = chance.geometric(1 / mean_length, 10_000)
        writer.add(chance.integers(0, vocab_size, lengths.sum(), dtype=dtype), lengths)
    writer.close()
    write_manifest(
        folder,
        Manifest(
            dtype=dtype.name,
            vocab_size=vocab_size,
            end_of_document_id=0,
            tokenizer_fingerprint="",
            splits={"train": tuple(writer.shards), "validation": ()},
            preparation={},
        ),
    )


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def read_once(data: TokenDataModule) -> dict[str, float]:
    """Read all steps; a worker's start counts as CPU time, and is left out of the wall time."""
    cpu, start, tokens = cpu_seconds(), None, 0
    for number, batch in enumerate(data.train_dataloader()):
        if number == 0:
            start = time.perf_counter()
        else:
            tokens += batch["tokens"][:, 1:].numel()
    seconds = time.perf_counter() - start
    return {"tokens_per_second": tokens / seconds, "tokens_per_cpu_second": tokens / (cpu_seconds() - cpu)}


def time_unpacking(data: TokenDataModule, repeats: int = 50) -> float:
    """Tokens per second of `unpack` on one core."""
    batch = next(iter(data.train_dataloader()))
    unpack(batch)
    start = time.perf_counter()
    for _ in range(repeats):
        unpack(batch)
    return repeats * batch["tokens"][:, 1:].numel() / (time.perf_counter() - start)


def main() -> None:
    """Make a corpus, read it once to warm the cache, then time the loader; of several passes the best counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000_000, help="size of the corpus")
    parser.add_argument("--vocab-size", type=int, nargs="+", default=[50_257, 128_256])
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=64, help="rows in one item of the loader")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--packing", nargs="+", default=["cut"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for vocab_size in options.vocab_size:
        with tempfile.TemporaryDirectory() as folder:
            synthetic_corpus(Path(folder), options.tokens, vocab_size)
            for shard in Path(folder).glob("*.bin"):
                shard.read_bytes()
            found += [measure(folder, options, *choice) for choice in choices(options)]
    if options.output:
        machine = f"{os.cpu_count()} cores of {platform.machine()}, torch {torch.__version__}"
        settings = {key: getattr(options, key) for key in ("tokens", "sequence_length", "batch", "steps", "repeats")}
        content = {"machine": machine, "settings": settings, "best of the passes": found}
        options.output.write_text(json.dumps(content, indent=1) + "\n")


def choices(options: argparse.Namespace) -> list[tuple[str, int]]:
    """Packing and number of workers of each measurement."""
    return [(packing, workers) for packing in options.packing for workers in options.workers]


def measure(folder: str, options: argparse.Namespace, packing: str, workers: int) -> dict:
    """Best of several passes, printed and returned."""
    data = TokenDataModule(
        path=folder,
        sequence_length=options.sequence_length,
        global_batch_size=options.batch,
        micro_batch_size=options.batch,
        num_workers=workers,
        packing=packing,
    )
    if packing == "best_fit":
        write_plans(Path(folder), data.manifest, options.sequence_length)
    data.setup()
    data.total_steps = options.steps
    passes = [read_once(data) for _ in range(options.repeats)]
    best = {key: round(max(one[key] for one in passes)) for key in passes[0]}
    row = {"stored": data.manifest.dtype, "packing": packing, "workers": workers, **best}
    row["unpack_tokens_per_second"] = round(time_unpacking(data))
    print(json.dumps(row))
    return row


if __name__ == "__main__":
    main()
