"""Stands for a training: its losses follow from its learning rate; it saves every step, and goes on where it stopped.

stub_training.py optimizer.lr=LR kind=KIND run.dir=DIR. The kinds: none; fails; killed; diverges; waits, which stops for
good after its first step unless it has been started before; and stays, which does the same and ignores SIGTERM.
"""

import json
import math
import os
import signal
import sys
from pathlib import Path

STEPS, VALIDATE_EVERY = 4, 1


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    folder, lr, kind = Path(given["run.dir"]), float(given["optimizer.lr"]), given.get("kind")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "starts").open("a") as starts:
        starts.write(f"{os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
    if kind == "fails":
        sys.exit("error: the disk is on fire")
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "stays":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    metrics = folder / "metrics.jsonl"
    done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    for step in range(done + 1, STEPS + 1):
        while kind in ("waits", "stays") and done == 0 and step > 1:
            signal.pause()
        # Good ends may have bad beginnings, or pruning would end every trial at its first validation.
        loss = math.nan if kind == "diverges" else (math.log(lr) + 6) ** 2 + 30 * (lr * 1e5 % 1) / step**2
        with metrics.open("a") as file:
            file.write(json.dumps({"step": step, "tokens": 8 * step, "train/loss": loss, "val/loss": loss}) + "\n")


main()
