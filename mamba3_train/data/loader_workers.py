"""Loader workers leave signals to the process that they read for."""

import os
import signal
import threading

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def leave_signals_to_the_trainer(worker: int) -> None:
    """Called in each worker: a terminal and a scheduler signal whole process groups, and a worker that died of it
    would fail the step that the trainer wants to finish before it saves."""
    signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)
    threading.Thread(target=_heed, args=[os.getppid()], daemon=True).start()


def _heed(trainer: int) -> None:
    while True:
        received = signal.sigwaitinfo(NUMBERS)
        if received.si_signo == signal.SIGTERM and received.si_pid == trainer:
            os._exit(0)  # how the loader ends workers; it takes another code for a failure
