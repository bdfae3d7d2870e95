"""The one exception that speaks to the person who started a command."""

import difflib


class UserError(Exception):
    """A mistake in what was asked for: one line saying what came, what was expected and what to do.

    Commands print it without a traceback and exit with code 2.
    """

    @property
    def line(self) -> str:
        """That line; one from a loader's worker arrives with the worker's traceback before it."""
        return str(self).strip().splitlines()[-1].removeprefix("mamba3_train.errors.UserError: ")


def nearest(name: str, choices: list[str]) -> str:
    """The end of a message about a wrong name: those that come near it, or all there are."""
    close = difflib.get_close_matches(name, sorted(set(choices)), n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(close)}?" if close else f"Valid names: {', '.join(sorted(choices))}."
