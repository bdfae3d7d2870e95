"""One process at a time in a folder of a corpus."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(folder: Path, doing: str) -> Iterator[None]:
    """Let one process at a time do something in a folder; the lock goes with the process, however it ends."""
    with open(folder / ".lock", "w") as file:
        try:
            # Unlike flock, such a lock is not shared with forked workers.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(f"waiting for another process that {doing}")
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield
