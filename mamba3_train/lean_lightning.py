"""Lightning, imported without what torchmetrics imports on the side: a third of the time that a command takes to start.

Lightning imports all of torchmetrics, of which nothing here is used; and torchmetrics imports, where they happen to be
installed, transformers, SciPy and matplotlib for metrics and plots of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_utilities.core import imports

LEFT_OUT = ("transformers", "scipy", "matplotlib")


@contextmanager
def _taken_for_missing(packages: tuple[str, ...]) -> Iterator[None]:
    """Until its end, whoever asks Lightning's utilities for one of these packages hears that it is not installed."""
    available, met = imports.package_available, imports.RequirementCache.__bool__

    def still_met(requirement: imports.RequirementCache) -> bool:
        if (requirement.requirement or "").startswith(packages):
            requirement.available, requirement.message = False, "left out by mamba3_train"
        return met(requirement)

    imports.package_available = lambda name: name not in packages and available(name)
    imports.RequirementCache.__bool__ = still_met
    try:
        yield
    finally:
        imports.package_available, imports.RequirementCache.__bool__ = available, met


with _taken_for_missing(LEFT_OUT):
    import torchmetrics  # noqa: F401

import lightning  # noqa: E402

__all__ = ["lightning"]
