"""Signals that ask a run to stop: noticed whatever the process is doing, acted on where nothing is lost."""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable

STOPPED = 85
"""Exit code of a run that was asked to stop: no failure, the same command continues it."""


def exit_code(number: int) -> int:
    """Of a run that a signal ends: 130 for Ctrl-C, as shells expect, else STOPPED, as a scheduler's wrapper does."""
    return 128 + number if number == signal.SIGINT else STOPPED


class StopSignals:
    """Notes SIGINT, SIGTERM, SIGUSR1, SIGUSR2 and, except under nohup, SIGHUP; a context manager for the main thread.

    Python runs a handler in the main thread between two of its instructions: not while it waits for another rank, or
    compiles. So a thread learns of signals, by the pipe that `signal.set_wakeup_fd` is for.

    A second signal of the same kind ends the process at once, if it comes `AGAIN` seconds later: launchers pass on to
    their processes what was sent to all of them.

    Set as a run goes on:
        leave_after: seconds after a signal at which the process leaves by itself, unwinding as `sys.exit` does, because
            there is nothing to save; None lets it go on, for whoever reads `received`.
        pass_on: called with each signal, from the thread.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
    AGAIN = 2.0
    UNWINDING = 10.0

    def __init__(self):
        self.started = time.time()
        self.received = 0
        """The last signal's number; 0 is none."""
        self.leave_after: float | None = 0.0
        self.pass_on: Callable[[int], None] | None = None
        self._first: dict[int, float] = {}
        self._leaving = False
        self._left = threading.Event()
        self._sending = threading.Lock()

    def __enter__(self) -> "StopSignals":
        self._reader, writer = os.pipe()
        os.set_blocking(writer, False)
        numbers = [n for n in self.NUMBERS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        self._writer, self._wakeup_before = writer, signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="stop signals", daemon=True)
        self._thread.start()
        _active.append(self)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.NUMBERS)
        return self

    def __exit__(self, *exception) -> None:
        _active.remove(self)
        with self._sending:  # a signal sent after the handlers are given back would kill the process
            self._give_back()
            self._left.set()
        os.write(self._writer, b"\0")  # not closed: a child process may hold the other end of it, too
        self._thread.join()
        os.close(self._reader)
        os.close(self._writer)

    def _give_back(self) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        if self._leaving:
            self._leaving = False  # once: what follows is the end of the process
            sys.exit(exit_code(self.received))

    def _watch(self) -> None:
        while not self._left.is_set():
            ready, _, _ = select.select([self._reader], [], [], self._seconds_left())
            for number in os.read(self._reader, 64) if ready else b"":
                if number in self._before:  # others with a handler in Python come here, too
                    self._receive(number)
            if self._seconds_left() == 0 and not self._left.is_set():
                self._leave()

    def _receive(self, number: int) -> None:
        now = time.monotonic()
        if number not in self._first:
            self._first[number], self.received = now, number
            if self.pass_on is not None:
                self.pass_on(number)
        elif now - self._first[number] >= self.AGAIN:
            if self.pass_on is not None:
                self.pass_on(signal.SIGKILL)
            os._exit(128 + number)

    def _seconds_left(self) -> float | None:
        if not self.received or self.leave_after is None:
            return None
        return max(0.0, self._first[self.received] + self.leave_after - time.monotonic())

    def _leave(self) -> None:
        name = signal.Signals(self.received).name
        os.write(1, f"stopped by {name}; there was nothing to save, and the same command goes on\n".encode())
        self._leaving = True
        end = time.monotonic() + self.UNWINDING
        while time.monotonic() < end:
            # Again, to the main thread itself, which may sleep and should call the handler now; and more than once:
            # it may have been about to fall asleep.
            with self._sending:
                if self._leaving and not self._left.is_set():
                    signal.pthread_kill(threading.main_thread().ident, self.received)
            if self._left.wait(0.1):
                return
        os._exit(exit_code(self.received))


def hold_signals() -> None:
    """Let signals wait for the StopSignals that is to come."""
    signal.pthread_sigmask(signal.SIG_BLOCK, StopSignals.NUMBERS)


_active: list[StopSignals] = []
_masks = threading.local()


def _hold() -> None:
    # What comes to a child before it has forgotten this process' pipe would be heard here.
    _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, StopSignals.NUMBERS)


def _release() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.before)


def _forget() -> None:
    """In a forked child, signals do what they did before."""
    while _active:
        _active.pop()._give_back()
    _release()


os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_forget)
