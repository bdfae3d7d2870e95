"""Launches on a second stream, beside others that leave some of the GPU idle."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor


class SideStream:
    """A second stream of a device; without one everything is launched in turn."""

    def __init__(self, device: torch.device | None):
        self.device, self.in_use = device, []

    @contextmanager
    def beside(self, *in_use: Tensor) -> Iterator[None]:
        """Launches within begin when all that were made so far are done; those that follow may run at the same time.

        in_use: what they use and nobody else keeps; held until `join`.
        """
        if self.device is None:
            yield
            return
        self.in_use.extend(in_use)
        stream = _second_stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            yield

    def join(self) -> None:
        """Let later launches wait for those that were made beside others."""
        if self.device is not None:
            torch.cuda.current_stream(self.device).wait_stream(_second_stream(self.device))
            self.in_use.clear()


@cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
