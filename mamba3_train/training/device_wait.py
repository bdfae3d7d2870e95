"""How long a device has nothing to do between steps."""

import torch

from mamba3_train.training.device_clock import DeviceClock


class DeviceWait:
    """Adds up the time from the end of one step's work to the beginning of the next one's, on the device itself.

    On a GPU a host that waits while the GPU still computes costs nothing.
    """

    def __init__(self, device: torch.device):
        self._clock = DeviceClock(device)
        self._end = None
        self._waits: list[tuple] = []

    def step_ended(self) -> None:
        """Everything of a step has been given to the device."""
        self._end = self._clock.now()

    def step_begins(self) -> None:
        """The next step has its batch on the device; without a step before it nothing counts."""
        if self._end is not None:
            self._waits.append((self._end, self._clock.now()))
            self._end = None

    def seconds(self) -> float:
        """Sum since the last call; on a GPU call it when the device has caught up."""
        waits, self._waits = self._waits, []
        return self._clock.seconds(waits)
