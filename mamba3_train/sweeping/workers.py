"""Trains the trials of a journal on this machine, several at a time."""

import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence

from mamba3_train.sweeping.journal import Claim, Journal, trial_name
from mamba3_train.sweeping.trial_process import STOPPED, TrialProcess

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# An idle worker looks so often for trials that another machine's worker left.
LOOK_SECONDS = 30.0
# A signal of the same kind is a second one when it comes later than this: launchers may send one twice.
AGAIN_SECONDS = 2.0


class Workers:
    """As many trials at a time as there are environments, until none is left or a signal comes.

    On a signal the trainings save and leave, and their trials wait for whoever runs the sweep next; on a second one of
    the same kind they are killed.

    Args:
        journal: where trials come from and what came of them goes.
        start: starts the training of a trial in an environment.
        environments: variables of each worker's trainings: its share of the GPUs.
        display: shows what happens.
        poll_seconds: time between two looks at the trainings.
    """

    def __init__(
        self,
        journal: Journal,
        start: Callable[[Claim, Mapping[str, str]], TrialProcess],
        environments: Sequence[Mapping[str, str]],
        display,
        poll_seconds: float = 0.5,
    ):
        self._journal, self._start, self._environments = journal, start, environments
        self._display, self._poll_seconds = display, poll_seconds
        self._running: dict[int, TrialProcess] = {}
        self._signals: dict[int, float] = {}
        self._killing = False
        self._look_at = 0.0

    def run(self) -> int:
        """Train; returns the signal that stopped it, 0 for none."""
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            while True:
                if not self._signals:
                    self._fill()
                if not self._running:
                    return next(iter(self._signals), 0)
                for worker in list(self._running):
                    self._advance(worker)
                self._display.show(self._running)
                if self._running:
                    time.sleep(self._poll_seconds)
        finally:
            for training in self._running.values():
                training.kill()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        now = time.monotonic()
        self._killing |= now > self._signals.setdefault(number, now) + AGAIN_SECONDS

    def _fill(self) -> None:
        free = [worker for worker in range(len(self._environments)) if worker not in self._running]
        if not free or time.monotonic() < self._look_at:
            return
        for worker in free:
            claim = self._journal.take()
            if claim is None:
                self._look_at = time.monotonic() + LOOK_SECONDS
                return
            training = self._start(claim, self._environments[worker])
            self._running[worker] = training
            values = ", ".join(f"{key}={value}" for key, value in claim.values.items())
            begins = f"goes on after step {training.first_step}" if training.first_step else "starts"
            self._display.say(f"{trial_name(claim.number)} {begins}: {values}")

    def _advance(self, worker: int) -> None:
        training = self._running[worker]
        code = training.poll()
        self._report(training)
        if self._signals:
            training.stop()
        if self._killing:
            training.kill()
        if code is not None:
            del self._running[worker]
            self._finish(training, code)
            training.claim.log.close()
            self._look_at = 0.0
            self._display.changed()

    def _report(self, training: TrialProcess) -> None:
        """Whether a trial is pruned depends on its losses, not on when they are read: each is judged in its turn."""
        losses = list(training.metrics.validations.items())
        for number, (step, loss) in enumerate(losses, start=1):
            if number <= training.validations_reported or training.pruned:
                continue
            worse = self._journal.report(training.claim, number, loss)
            training.validations_reported = number
            if worse and step < training.last_step:
                training.pruned = True
                training.stop()

    def _finish(self, training: TrialProcess, code: int) -> None:
        claim, name = training.claim, trial_name(training.claim.number)
        if training.pruned:
            self._journal.prune(claim)
            self._display.say(f"{name} pruned after {training.validations_reported} validations")
        elif code == 0:
            self._judge(training)
        elif self._signals:
            self._display.say(f"{name} stopped after step {training.step}")
        elif code in STOPPED and training.step > training.first_step:
            self._display.say(f"{name} was stopped after step {training.step} by a signal that was not ours")
        else:
            self._fail(claim, training.failure(code))

    def _judge(self, training: TrialProcess) -> None:
        losses = list(training.metrics.validations.values())
        if not losses:
            self._fail(training.claim, "it ended without a val/loss in metrics.jsonl")
        elif not math.isfinite(losses[-1]):
            self._fail(training.claim, f"its val/loss is {losses[-1]}")
        else:
            self._journal.complete(training.claim, losses[-1])
            self._display.say(f"{trial_name(training.claim.number)} complete: val/loss {losses[-1]:.4f}")

    def _fail(self, claim: Claim, error: str) -> None:
        self._journal.fail(claim, error)
        self._display.say(f"{trial_name(claim.number)} failed: {error}")
