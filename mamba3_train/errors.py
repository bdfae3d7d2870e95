"""The one exception that speaks to the person who started a command."""


class UserError(Exception):
    """A mistake in what was asked for: one line saying what came, what was expected and what to do.

    Commands print it without a traceback and exit with code 2.
    """
