"""How a process that trained with others ends: with the exit code that it has, and at once."""

import atexit
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def at_once() -> Iterator[None]:
    """What a rank's script does, around all of it: after it, the process ends where Python's own end would begin.

    A thread of gloo's drops a collective's tensors some time after the collective is over. Needing the interpreter for
    that while it is taken down, the thread aborts the process: with 134, although all is done. And it cannot be ended
    before: it lives as long as anything refers to its group, as DTensor's caches always do.

    What has been registered with `atexit` in the meantime is called first. A process that is alone ends as ever.
    """
    code = 1  # of an exception that leaves the script

    def end() -> None:
        if "RANK" in os.environ:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    atexit.register(end)
    try:
        yield
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        raise
