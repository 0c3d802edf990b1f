"""What commands share: arguments, sources and output."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pairtune.errors import BadInput, plural
from pairtune.extras import require
from pairtune.flags import COLUMN_PARTS
from pairtune.screen import harmless, screen

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

    from pairtune.config import Reading, Wanted
    from pairtune.data.source_reader import SourceReader
    from pairtune.resolve_config import Resolved

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Columns = Annotated[list[str] | None, typer.Option("--column")]
Confirmed = Annotated[bool, typer.Option("--yes", help="Confirm that the named columns say which answer is better.")]
SourceArgument = Annotated[
    str,
    typer.Argument(metavar="SRC", help="As for tune's --data: a file, a folder, a Hub id, bundled:concise, or votes."),
]

VOTES = "votes"  # as a source: the pairs of the votes given on this machine's site


def check_choice(flag: str, given: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not among the choices of a flag."""
    if given not in choices:
        raise BadInput(f"{flag}: should be {', '.join(choices[:-1])} or {choices[-1]} (given: {given!r})")


def open_reader(source: str, reading: Reading, limit: int | None, flag: str = "SRC") -> SourceReader:
    """The source, of which the first rows are known to be readable."""
    from pairtune.config import SourceConfig
    from pairtune.data.source_reader import SourceReader

    source = str(frozen_votes("data")) if source == VOTES else source
    if not source.strip():
        raise BadInput(f"{flag}: is empty; name a file, a folder, a Hub id or bundled:concise")
    reader = SourceReader.open(SourceConfig(source=source), flag, reading, limit)
    reader.probe()
    return reader


def reading_of(
    columns: list[str] | None, pairs: str, min_gap: float, confirmed: bool = False, wanted: Wanted = "pairs"
) -> Reading:
    """How rows are read, from the flags that say so."""
    from pairtune.config import Reading

    check_choice("--pairs", pairs, ("best-worst", "all"))
    if not 0 <= min_gap < float("inf"):
        raise BadInput(f"--min-gap: must be 0 or more, not {min_gap:g}")
    named = columns_of(columns).get("columns", {})
    return Reading(named, pairs, min_gap, confirmed, wanted=wanted)  # type: ignore[arg-type]


def columns_of(given: list[str] | None) -> dict[str, Any]:
    """The setting `columns` from `PART=NAME` arguments."""
    columns: dict[str, str] = {}
    for text in given or []:
        part, equals, name = text.partition("=")
        part = part.replace("-", "_")
        if part not in COLUMN_PARTS or not (equals and name):
            raise BadInput(f"--column {text}: should be PART=NAME, where PART is {', '.join(COLUMN_PARTS)}")
        # Several annotators' columns may be given one by one.
        columns[part] = f"{columns[part]},{name}" if part == "label" and part in columns else name
    return {"columns": columns} if columns else {}


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


def with_votes(resolved: Resolved) -> Resolved:
    """The settings with the source `votes` replaced by a file of today's pairs, which later votes don't change."""
    from pairtune.resolve_config import Resolved

    changed, single = {}, resolved.config.unpaired
    for name in ("data", "eval_data", "test_data"):
        sources = getattr(resolved.config, name) or []
        if any(source.source == VOTES for source in sources):
            changed[name] = [
                each.model_copy(update={"source": str(frozen_votes(name, single=single))})
                if each.source == VOTES
                else each
                for each in sources
            ]
    return Resolved(resolved.config.model_copy(update=changed), resolved.origins) if changed else resolved


def frozen_votes(name: str, *, single: bool = False) -> Path:
    """A file of the pairs, or the single answers, that today's votes give; `name` is the setting that asks for them.

    Raises:
        BadInput: no vote gives a pair.
    """
    require("serve", f"--{name.replace('_', '-')} {VOTES}")
    from pairtune.web.server import open_database

    open_database()
    from pairtune.web.ballots import snapshot

    path, found = snapshot(single=single)
    told = "" if single else "".join(f", {count} {reason}" for reason, count in found.reasons)
    rows = plural(len(found.labels), "answer") if single else plural(len(found.pairs), "pair")
    say(f"{VOTES}: {rows} of {plural(len(found.votes), 'vote')}{told}", err=True)
    if not (found.labels if single else found.pairs):
        wanted, how = ("an answer", "press a thumb") if single else ("a pair", "prefer answers")
        raise BadInput(
            f"--{name.replace('_', '-')} {VOTES}: no vote gives {wanted} yet; vote in the arena (pairtune serve), or "
            f"{how} in a chat"
        )
    say(f"{VOTES}: kept as {path}", err=True)
    return path
