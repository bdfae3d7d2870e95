"""How long a device has nothing to do between steps."""

import time

import torch


class DeviceWait:
    """Adds up the time from the end of one step's work to the beginning of the next one's, on the device itself.

    On a GPU the marks are events in its queue: a host that waits while the GPU still computes costs nothing.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._end = None
        self._waits: list[tuple] = []

    def step_ended(self) -> None:
        """Everything of a step has been given to the device."""
        self._end = self._mark()

    def step_begins(self) -> None:
        """The next step has its batch on the device; without a step before it nothing counts."""
        if self._end is not None:
            self._waits.append((self._end, self._mark()))
            self._end = None

    def seconds(self) -> float:
        """Sum since the last call; on a GPU call it when the device has caught up."""
        waits, self._waits = self._waits, []
        if self._on_gpu:
            return sum(end.elapsed_time(begin) for end, begin in waits) / 1000
        return sum(begin - end for end, begin in waits)

    def _mark(self):
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
