"""The command line: wiring only. Heavy imports happen inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import errno
import sys
from typing import Annotated, NoReturn

import typer

from pairtune.cli.common import say
from pairtune.cli.data import data_app
from pairtune.cli.results import results_app
from pairtune.cli.serving import serving_app
from pairtune.cli.training import training_app
from pairtune.cli.votes import votes_app
from pairtune.errors import BadInput, Interrupted, RunFailed
from pairtune.screen import harmless
from pairtune.version import __version__

# The base class of usage errors. Typer bundles its own copy of click and exports only some of its exceptions.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

_LONG_NAME = 120  # characters of a name in an error message
_INTERRUPTED = 130  # Typer's exit code after Ctrl-C, as that of shells

app = typer.Typer(
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing rich takes as long as the rest of `--help`
    help="Tune a small language model to people's preferences, on the machine you have.",
)

for commands in (training_app, results_app, serving_app):
    app.add_typer(commands)
app.add_typer(data_app, name="data")
app.add_typer(votes_app, name="votes")


def _show_version(wanted: bool) -> None:
    if wanted:
        say(f"pairtune {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _app(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        say(context.get_help())


def main() -> NoReturn:
    """Run the command line. Exit codes: 0 success, 1 failure, 2 bad input (one line, never a traceback), 130 Ctrl-C."""
    try:
        code = app(standalone_mode=False)
    except BadInput as error:
        _fail(str(error), 2)
    except _UsageError as error:
        _fail(error.format_message(), 2)  # type: ignore[attr-defined]
    except Interrupted as error:
        _fail(str(error), _INTERRUPTED)
    except RunFailed as error:
        _fail(str(error), 1)
    except OSError as error:
        _fail_of_file(error)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    if code == _INTERRUPTED:
        _fail("interrupted; `pairtune resume RUN` continues a run folder that has no COMPLETE", _INTERRUPTED)
    sys.exit(code or 0)


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {harmless(message)}", file=sys.stderr)
    sys.exit(code)


# What a person can do about a file that cannot be read or written.
_REMEDIES = {
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.ENOENT: "there is no such file or folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EISDIR: "is a folder; name a file",
    errno.EACCES: "may not be read or written; choose another place, or ask its owner",
    errno.EPERM: "may not be changed; choose another place, or ask its owner",
    errno.EROFS: "cannot be written, since its file system is read-only; choose another place",
    errno.ELOOP: "is a link that leads to itself",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
    errno.EIO: "cannot be read or written; the disk may be failing",
}


def _fail_of_file(error: OSError) -> NoReturn:
    """End with the line for a file that cannot be read or written; other errors of the system are faults of ours."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}the disk is full; free some space, then `pairtune resume RUN` goes on with an unfinished run", 1)
    if error.filename is None or error.errno not in _REMEDIES:
        raise error
    name = str(error.filename)
    _fail(f"{name if len(name) <= _LONG_NAME else f'{name[:_LONG_NAME]}…'}: {_REMEDIES[error.errno]}", 2)
