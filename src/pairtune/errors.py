"""Errors that the command line prints as one line, and helpers for their messages."""

from __future__ import annotations


class BadInput(Exception):
    """Input that cannot be used: a file, a row, a field, a flag, a model name.

    The message is one line that names the input and says what to do. The command line prints it without a traceback
    and exits with code 2.
    """


class RunFailed(Exception):
    """A run that one of its own checks stopped, for example because a trial did not start from the base weights.

    The message is the diagnosis. The command line prints it without a traceback and exits with code 1.
    """


class Interrupted(RunFailed):
    """A run that the user stopped; it has written a checkpoint. The command line exits with code 130."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """A library's exception message as one line, for use inside one of our own messages."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def plural(count: int, noun: str) -> str:
    """A count with its noun, for use in messages: `1 trial`, `2 trials`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
