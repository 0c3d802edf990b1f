"""`pairtune votes`: people's votes, given in the site."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pairtune.cli.common import Json, say
from pairtune.errors import BadInput, plural
from pairtune.extras import require

votes_app = typer.Typer(help="People's votes, given in the site.", no_args_is_help=True, rich_markup_mode=None)


@votes_app.command("export")
def export_votes(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder to write.")], as_json: Json = False
) -> None:
    """Write all votes, and the pairs and labels that they give, with provenance.

    pairs.jsonl has TRL's conversational preference format, unpaired.jsonl its unpaired format, votes.jsonl every vote
    as it was given, and votes.json says what became of them.
    """
    require("serve", "pairtune votes export")
    if out.exists():
        raise BadInput(f"OUT {out}: already exists; choose another name, or remove it first")
    from pairtune.web.server import open_database

    open_database()
    from pairtune.votes.pairs import harvest
    from pairtune.web.ballots import all_votes

    found = harvest(all_votes())
    if not found.votes:
        raise BadInput("OUT: nobody has voted yet; vote in the arena, or give thumbs in a chat (pairtune serve)")
    found.write(out)
    if as_json:
        say(json.dumps({"out": str(out), **found.account()}))
        return
    left_out = "".join(f", {count} {reason}" for reason, count in found.reasons)
    say(
        f"{out}: {plural(len(found.pairs), 'pair')} and {plural(len(found.labels), 'label')} of "
        f"{plural(len(found.votes), 'vote')}; in pairs: {found.used}{left_out}"
    )
