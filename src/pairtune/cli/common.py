"""What commands share: arguments, sources and output."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from pairtune.errors import BadInput, plural
from pairtune.flags import COLUMN_PARTS
from pairtune.screen import harmless, screen

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Columns = Annotated[list[str] | None, typer.Option("--column")]
Confirmed = Annotated[bool, typer.Option("--yes", help="Confirm that the named columns say which answer is better.")]
SourceArgument = Annotated[
    str,
    typer.Argument(metavar="SRC", help="As for tune's --data: a file, a folder, a Hub id, bundled:concise, or votes."),
]


def columns_of(given: list[str] | None) -> dict[str, str]:
    """The columns that `PART=NAME` arguments name, by part."""
    columns: dict[str, str] = {}
    for text in given or []:
        part, equals, name = text.partition("=")
        part = part.replace("-", "_")
        if part not in COLUMN_PARTS or not (equals and name):
            raise BadInput(f"--column {text}: should be PART=NAME, where PART is {', '.join(COLUMN_PARTS)}")
        # Several annotators' columns may be given one by one.
        columns[part] = f"{columns[part]},{name}" if part == "label" and part in columns else name
    return columns


def say(text: str, *, err: bool = False) -> None:
    """Print a line; what files may have put into it is made harmless."""
    typer.echo(harmless(text), err=err)


def output() -> Console:
    """The console for results, on standard output."""
    return screen(width=None if sys.stdout.isatty() else 140)


def loading() -> Status:
    """Within this context, a terminal shows that libraries are being imported, which takes seconds."""
    return screen(stderr=True).status("loading PyTorch")


def confirm(cost: dict[str, int], judge: str) -> None:
    """Show the cost of calling an endpoint, and continue only if the user agrees."""
    asked = f"{plural(cost['calls'], 'call')} with about {plural(cost['tokens'], 'token')} to {judge}"
    if not cost["calls"]:
        return
    if not sys.stdin.isatty():
        raise BadInput(f"--yes: is required if standard input is not a terminal; this would make {asked}")
    typer.confirm(harmless(f"This makes {asked}. Continue?"), abort=True, err=True)


def share_processors(*, give_way: bool) -> None:
    """Set how threads wait for each other, which torch reads when it is imported, and this process's priority.

    Spinning threads are a third faster on an idle machine, and many times slower beside another busy program (LOG.md).

    Args:
        give_way: lower the priority, so that a chat beside a training run stays responsive; training loses little.
    """
    from pairtune.environment import others_are_busy

    if others_are_busy():
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if give_way:
        with suppress(OSError, AttributeError):
            os.nice(10)
