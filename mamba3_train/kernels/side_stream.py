"""Launches beside those that leave some of the GPU idle, on a second stream."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """Launches within begin when all that were made so far are done; those that follow may run at the same time.

    What they use has to be kept until `join`.
    """
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield


def join(device: torch.device) -> None:
    """Let later launches wait for those that were made `beside` others."""
    torch.cuda.current_stream(device).wait_stream(_stream(device))


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
