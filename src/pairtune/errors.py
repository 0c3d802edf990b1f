"""What a person can mend, what a guard stopped, and what a person stopped."""

from __future__ import annotations


class BadInput(Exception):
    """Something a person gave cannot be used: a file, a row, a field, a flag, a model name.

    The message is one line that names the thing and says what to do. The command line prints it
    without a traceback and exits with code 2.
    """


class RunFailed(Exception):
    """A run stopped on its own guard (for example: a trial that did not start at the base weights).

    The message is the diagnosis. The command line prints it without a traceback and exits with code 1.
    """


class Interrupted(RunFailed):
    """A person asked the run to stop, and it did, with a checkpoint."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """The text of a library's exception as one line, for use inside a message of our own."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
