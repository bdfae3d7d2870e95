"""A thread that ends a process which makes no progress."""

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: what failed is not the program, and trying again may help


class Watchdog:
    """Ends this process, by `EXIT_CODE`, when nothing calls `allow` in time; all threads' stacks are written first.

    A rank whose partner died or hangs waits in a collective that no exception leaves. Ending it by force lets the
    launcher end the others, and the same command go on from the newest checkpoint.

    Args:
        stacks: file that the stacks are written to, besides standard error.
    """

    def __init__(self, stacks: Path):
        self.stacks = stacks
        self._deadline: float | None = None
        self._allowed, self._doing = 0.0, ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def allow(self, seconds: float, doing: str) -> None:
        """There was progress; now `doing` may take so many seconds. The first call starts the thread."""
        self._allowed, self._doing = seconds, doing
        self._deadline = time.monotonic() + seconds
        if not self._thread.ident:
            self._thread.start()

    def stop(self) -> None:
        """Watch no more."""
        self._ended.set()
        if self._thread.ident:
            self._thread.join()

    def _watch(self) -> None:
        while True:
            left = self._deadline - time.monotonic()
            if left <= 0:
                self._end()
            # Python's own timer needs no lock of the interpreter: it ends a process whose every thread is stuck.
            faulthandler.dump_traceback_later(left + 60.0, exit=True)
            if self._ended.wait(min(left, 1.0)):
                faulthandler.cancel_dump_traceback_later()
                return

    def _end(self) -> None:
        message = f"no progress for {self._allowed:g} seconds while {self._doing}: this process ends with {EXIT_CODE}"
        print(f"error: {message}; the stacks of its threads are in {self.stacks}", file=sys.stderr, flush=True)
        try:
            with self.stacks.open("w") as file:
                file.write(message + "\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        os._exit(EXIT_CODE)
