"""What preparing costs: speed beside `tokenizers` alone, and memory over a corpus of any size.

python tools/benchmark_prepare.py speed [--source PATH] [--workers 2] [--repeats 3] [--output FILE.json]
python tools/benchmark_prepare.py memory [--gigabytes 10] [--output FILE.json]

Speed: the standard library's sources or another source, byte-level BPE; seconds on the clock and CPU seconds of all
processes, `tokenizers` alone in as many processes as `prepare` has workers, in turns: give it as many cores. Memory:
documents made up as they are read, on no disk, and a tokenizer of whole words, so that it is over soon; resident memory
of the main process and of the largest worker.
"""

import argparse
import json
import os
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import tokenizers
from tokenizers import models, pre_tokenizers

from mamba3_train.data.preparation import Preparation
from mamba3_train.data.text_sources import TextSource
from mamba3_train.data.tokenizer import Tokenizer


def seconds_of(action: Callable[[], None]) -> dict[str, float]:
    """Seconds on the clock, and CPU seconds of this process and of those it starts and ends meanwhile."""

    def used() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    cpu, begin = used(), time.monotonic()
    action()
    return {"clock": round(time.monotonic() - begin, 2), "cpu": round(used() - cpu, 2)}


def encode_alone(tokenizer_file: str, texts: list[str]) -> None:
    """What any use of `tokenizers` must do: encode and fetch the ids."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    backend = tokenizers.Tokenizer.from_file(tokenizer_file)
    for begin in range(0, len(texts), 64):
        for encoding in backend.encode_batch_fast(texts[begin : begin + 64], add_special_tokens=False):
            _ = encoding.ids


def measure_speed(options: argparse.Namespace, folder: Path) -> dict:
    """Seconds of both, in turns."""
    texts = list(TextSource(options.source).documents())
    source, tokenizer = folder / "text.jsonl", folder / "tokenizer.json"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    Tokenizer.train(texts[:300], 8192).save(tokenizer)
    parts = [texts[number :: options.workers] for number in range(options.workers)]

    def alone() -> None:
        processes = [get_context("fork").Process(target=encode_alone, args=(str(tokenizer), part)) for part in parts]
        for process in processes:
            process.start()
        for process in processes:
            process.join()

    def prepare(name: str) -> Callable[[], object]:
        made = Preparation(
            source={"path": str(source)}, tokenizer={"file": str(tokenizer)}, workers=options.workers, deduplicate=True
        )
        return lambda: made.run(folder / name)

    prepare("first")()  # imports `datasets`, once
    found = []
    for number in range(options.repeats):
        found.append({"alone": seconds_of(alone), "prepare": seconds_of(prepare(str(number)))})
        print(json.dumps(found[-1]), flush=True)

    def ratio(reduce: Callable, kind: str) -> float:
        alone, prepare = ([one[name][kind] for one in found] for name in ("alone", "prepare"))
        return round(reduce(alone) / reduce(prepare), 3)

    return {
        "megabytes": round(sum(map(len, texts)) / 1e6, 1),
        "workers": options.workers,
        "seconds": found,
        "speed_beside_tokenizers_alone": {
            kind: {"all passes": ratio(sum, kind), "median": ratio(median, kind), "best": ratio(min, kind)}
            for kind in ("clock", "cpu")
        },
    }


# Long, so that a gigabyte of them is soon tokenized.
WORDS = [f"word{number}".ljust(40, "x") for number in range(5000)]


@dataclass(frozen=True)
class MadeUp(TextSource):
    """Documents of about 3,000 characters, each different, made as they are read."""

    def read(self, position: dict | None = None) -> Iterator[tuple[list[str], dict]]:
        """See `TextSource.read`."""
        consumed, number = (position["bytes"], position["rows"]) if position else (0, 0)
        words = " ".join(WORDS[i * 7919 % len(WORDS)] for i in range(3_000))
        while consumed < self.max_bytes:
            texts = [f"w{n} {words[n % 90_000 : n % 90_000 + 2000 + n % 2000]}" for n in range(number, number + 256)]
            number += len(texts)
            consumed += sum(map(len, texts))
            yield texts, {"bytes": consumed, "rows": number}

    def size(self) -> int:
        """See `TextSource.size`."""
        return self.max_bytes


def resident_mib(process: int | str) -> dict[str, int]:
    """Peak and present memory of a process in MiB: its own, and pages of files mapped (which the system may drop)."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return {key: int(values[key].split()[0]) >> 10 for key in ("VmHWM", "RssAnon", "RssFile")}


def measure_memory(options: argparse.Namespace, folder: Path) -> dict:
    """Memory while a large corpus is prepared, at every tenth of it."""
    vocabulary = {"<|endoftext|>": 0, "?": 1} | {word: number for number, word in enumerate(WORDS, start=2)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(folder / "tokenizer.json"))
    limit, rows = int(options.gigabytes * 1e9), []
    preparation = Preparation(
        source=MadeUp("made up", max_bytes=limit),
        tokenizer={"file": str(folder / "tokenizer.json")},
        workers=options.workers,
        checkpoint_seconds=10,
    )
    done = threading.Event()

    def watch() -> None:
        journal, next_tenth = folder / "out" / ".preparing" / "journal.json", 1
        while not done.wait(1.0):
            try:
                position = json.loads(journal.read_text())["sources"]["text"]["position"]
                bytes_read = position["bytes"]
                if bytes_read < next_tenth * limit / 10:
                    continue
                children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
                workers = [resident_mib(child) for child in children]
            except (FileNotFoundError, TypeError):
                continue
            next_tenth = int(10 * bytes_read / limit) + 1
            largest = max(workers, key=lambda worker: worker["VmHWM"], default={})
            rows.append({"gigabytes": round(bytes_read / 1e9, 2), "main": resident_mib("self"), "worker": largest})
            print(json.dumps(rows[-1]), flush=True)

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.monotonic()
    manifest = preparation.run(folder / "out")
    done.set()
    watcher.join()
    return {
        "gigabytes": options.gigabytes,
        "documents": sum(shard.documents for shard in manifest.shards()),
        "tokens": sum(shard.tokens for shard in manifest.shards()),
        "seconds": round(time.monotonic() - begin),
        "mib": rows,
    }


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "memory"])
    parser.add_argument("--source", default="python_stdlib", help="text for the speed: a path as source.path takes it")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--output", type=Path, help="JSON to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = (measure_speed if options.what == "speed" else measure_memory)(options, Path(folder))
    print(json.dumps(found, indent=1))
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
