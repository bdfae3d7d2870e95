"""One trial being trained: its process, its log, what its metrics say."""

import ctypes
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from mamba3_train.evaluation.metrics import MetricsTail
from mamba3_train.sweeping.journal import Claim

# Time to save and leave.
PATIENCE_SECONDS = 600
# How a training ends that somebody asked to stop: with a checkpoint, or before it could listen.
STOPPED = (85, 128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM)
# What a launcher or SLURM says to this process is not for a training of its own.
LAUNCHER = ("SLURM_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_", "GROUP_", "TORCHELASTIC_")
_PR_SET_PDEATHSIG = 1


class TrialProcess:
    """A process that trains a trial, in a session of its own: a Ctrl-C reaches it only through us.

    Args:
        claim: the trial; its log gets what the process prints.
        command: what to run.
        folder: the run folder that it writes.
        last_step: the step that it ends at.
        environment: variables added to ours.
    """

    def __init__(
        self, claim: Claim, command: Sequence[str], folder: Path, last_step: int, environment: Mapping[str, str]
    ):
        self.claim, self.last_step = claim, last_step
        self.metrics = MetricsTail(folder / "metrics.jsonl")
        self.metrics.read()
        self.first_step = self.step
        self.validations_reported = 0
        self.pruned = False
        self._stopped_at: float | None = None
        ours = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER)}
        claim.log.write(f"{shlex.join(command)}\n".encode())
        claim.log.flush()
        self._log_begin = claim.log.tell()
        self._process = subprocess.Popen(
            command,
            env=ours | dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=claim.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_stop_with_parent,  # we have no threads
        )

    @property
    def step(self) -> int:
        """The newest step logged."""
        return self.metrics.newest.get("step", 0)

    def poll(self) -> int | None:
        """The exit code once it has ended; its metrics are read after that was asked, so none is missed."""
        code = self._process.poll()
        self.metrics.read()
        if code is None and self._stopped_at is not None and time.monotonic() > self._stopped_at + PATIENCE_SECONDS:
            self.kill()
        return code

    def stop(self) -> None:
        """Ask it to save and leave; once, because a second signal would end it at once."""
        if self._stopped_at is None:
            self._stopped_at = time.monotonic()
            self._process.terminate()

    def kill(self) -> None:
        """End it and all that it started, now."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def failure(self, code: int) -> str:
        """Why it ended with this code, in a line: the last error in its log, or the last line."""
        with open(self.claim.log.name, "rb") as file:
            file.seek(self._log_begin)
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        line = (errors or lines or ["it printed nothing"])[-1].removeprefix("error: ")
        if code < 0:
            return f"killed by {signal.Signals(-code).name}; its last line: {line}"
        return line


def _stop_with_parent() -> None:
    """Runs in the new process: when the sweep is killed, its trainings save and leave, and free their GPUs."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


_LIBC = ctypes.CDLL(None) if hasattr(ctypes.CDLL(None), "prctl") else None
