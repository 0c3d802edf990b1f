"""Sources that a person named, opened; votes among them, which are frozen in a file first."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pairtune.errors import BadInput, plural
from pairtune.extras import require
from pairtune.flags import COLUMN_PARTS
from pairtune.screen import harmless

if TYPE_CHECKING:
    from pairtune.config import Pairing, Reading, RunConfig, Wanted
    from pairtune.data.source_reader import SourceReader
    from pairtune.resolve_config import Resolved

VOTES = "votes"  # as a source: the pairs of the votes given on this machine's site


def check_choice(flag: str, given: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not among the choices of a flag."""
    if given not in choices:
        raise BadInput(f"{flag}: should be {', '.join(choices[:-1])} or {choices[-1]} (given: {given!r})")


def reading_of(
    columns: Mapping[str, str] | None,
    pairs: Pairing,
    min_gap: float,
    confirmed: bool = False,
    wanted: Wanted = "pairs",
) -> Reading:
    """How rows are read.

    Args:
        columns: which column holds which part.
        pairs: which pairs a list of rated answers gives.
        min_gap: the least difference between the scores of a pair's answers.
        confirmed: whether a person has confirmed that the columns say which answer is better.
        wanted: what rows should give.

    Raises:
        BadInput: a value is not allowed.
    """
    from pairtune.config import Reading

    for part in columns or {}:
        if part not in COLUMN_PARTS:
            raise BadInput(f"--column {part}: is no part of a pair; should be one of {', '.join(COLUMN_PARTS)}")
    check_choice("--pairs", pairs, ("best-worst", "all"))
    if not 0 <= min_gap < float("inf"):
        raise BadInput(f"--min-gap: must be 0 or more, not {min_gap:g}")
    return Reading(dict(columns or {}), pairs, min_gap, confirmed, wanted=wanted)  # type: ignore[arg-type]


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


def probe(config: RunConfig) -> None:
    """Refuse sources in no known format, and faults in their first rows, before torch is imported.

    Raises:
        BadInput: a source cannot be read, or one of its first rows cannot be used.
    """
    from pairtune.data.source_reader import SourceReader

    parts = (
        ("--data", config.data, "train"),
        ("--eval-data", config.eval_data, "validation"),
        ("--test-data", config.test_data, "test"),
    )
    for flag, sources, split in parts:
        for source in sources or []:
            SourceReader.open(source, flag, config.reading, config.row_limit(split)).probe(config.on_bad_row)


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
    _tell(f"{VOTES}: {rows} of {plural(len(found.votes), 'vote')}{told}")
    if not (found.labels if single else found.pairs):
        wanted, how = ("an answer", "press a thumb") if single else ("a pair", "prefer answers")
        raise BadInput(
            f"--{name.replace('_', '-')} {VOTES}: no vote gives {wanted} yet; vote in the arena (pairtune serve), or "
            f"{how} in a chat"
        )
    _tell(f"{VOTES}: kept as {path}")
    return path


def _tell(text: str) -> None:
    print(harmless(text), file=sys.stderr)
