"""Moments on a device, without waiting for it."""

import time

import torch


class DeviceClock:
    """On a GPU a moment is an event in its queue: the time between two is that of its work, whatever the host does."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"

    def now(self) -> float | torch.cuda.Event:
        """When all that the device was given so far is done."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, spans: list[tuple]) -> float:
        """Sum over spans, pairs of moments; on a GPU call it when the device has caught up."""
        if self._on_gpu:
            return sum(begin.elapsed_time(end) for begin, end in spans) / 1000
        return sum(end - begin for begin, end in spans)
