"""`pairtune data`: commands for preference data before anything is trained on it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from pairtune.cli.common import (
    Columns,
    Confirmed,
    Json,
    SourceArgument,
    columns_of,
    confirm,
    loading,
    output,
    say,
    share_processors,
)
from pairtune.errors import BadInput, plural
from pairtune.flags import WithSettingsHelp
from pairtune.open_data import check_choice, open_reader, reading_of
from pairtune.screen import harmless, screen

data_app = typer.Typer(
    help="Inspect and convert preference data before training on it.", no_args_is_help=True, rich_markup_mode=None
)


@data_app.command("inspect", cls=WithSettingsHelp)
def inspect(
    source: SourceArgument,
    model: Annotated[str, typer.Option(help="Model whose tokenizer and chat template are used.")] = "smollm2-135m",
    max_length: Annotated[int, typer.Option(min=16)] = 1024,
    limit: Annotated[int | None, typer.Option(min=1)] = None,
    columns: Columns = None,
    pairs: str = "best-worst",
    min_gap: float = 0.0,
    yes: Confirmed = False,
    figures: Annotated[Path | None, typer.Option(help="Folder for histograms as PNG.")] = None,
    as_json: Json = False,
) -> None:
    """Report what a source contains, what is wrong with it, and what a model would see.

    Exit code 2 if it is not usable, or if columns were named and nobody has confirmed (here or with --yes) that the
    better answer is the one that is shown.
    """
    from pairtune.api import inspect as inspect_pairs
    from pairtune.run.records import dump

    report = inspect_pairs(
        source,
        model=model,
        max_length=max_length,
        limit=limit,
        columns=columns_of(columns),
        pairs=pairs,  # type: ignore[arg-type]
        min_gap=min_gap,
        accept_columns=yes,
    )
    found = report.record
    drawn = {}
    if figures and found.kept:
        from pairtune.report.figures import draw_lengths

        drawn = {"figures": [str(draw_lengths(found, figures / "lengths.png"))]}
    if as_json:
        say(json.dumps(dump(found) | drawn))
    else:
        output().print(report.rendered(), highlight=False)
    if found.verdict == "not confirmed" and sys.stdin.isatty() and not as_json:
        if typer.confirm(harmless(f"Is this the better answer: {found.better}?"), err=True):
            return
        raise BadInput("not confirmed; name other columns (pairtune data inspect --help)")
    if found.verdict in ("not usable", "not confirmed"):
        raise typer.Exit(2)


@data_app.command("convert", cls=WithSettingsHelp)
def convert(
    source: SourceArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New .jsonl or .parquet file to write.")],
    limit: Annotated[int | None, typer.Option(min=1)] = None,
    columns: Columns = None,
    pairs: str = "best-worst",
    min_gap: float = 0.0,
    yes: Confirmed = False,
    on_bad_row: str = "stop",
    as_json: Json = False,
) -> None:
    """Convert a source to TRL's conversational format."""
    check_choice("--on-bad-row", on_bad_row, ("stop", "skip"))
    reader = open_reader(source, reading_of(columns_of(columns), pairs, min_gap, yes, "either"), limit)  # type: ignore[arg-type]

    from pairtune.data.convert import convert_source
    from pairtune.run.records import dump

    account = convert_source(reader, out, on_bad_row).account()  # type: ignore[arg-type]
    if as_json:
        say(json.dumps({"out": str(out), **dump(account)}))
        return
    dropped = "".join(f", {rows:,} {reason}" for reason, rows in account.dropped.items())
    say(f"{out}: {plural(account.kept, 'pair')} from {plural(account.rows_in, 'row')}{dropped}")
    say(f"the better answer: {reader.better}", err=True)
    for field, rows in reader.parser.unused.items():
        say(f"not used: {field} ({plural(rows, 'row')})", err=True)


@data_app.command("draft", cls=WithSettingsHelp)
def draft(
    prompts: Annotated[Path, typer.Option(help="Prompts: a text file, one a line, or .jsonl with a field prompt.")],
    out: Annotated[Path, typer.Option(help="New .jsonl file to write; with --rounds, a new folder.")],
    model: Annotated[str, typer.Option(help="The model that answers: a run, RUN/TRIAL, an adapter or a model.")],
    answers: Annotated[int, typer.Option(min=2, max=64, help="Answers to each prompt.")] = 4,
    judge: Annotated[
        str,
        typer.Option(help="What ranks them: rule, concise, a reward model, or an OpenAI-style endpoint (http...)."),
    ] = "rule",
    judge_model: Annotated[str | None, typer.Option(help="Name of the judge model at the endpoint.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Confirm the cost of an endpoint.")] = False,
    temperature: Annotated[float, typer.Option(min=0.05, max=2, help="Sampling temperature.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Length at which an answer is cut off.")] = 160,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    rounds: Annotated[int, typer.Option(min=0, help="Train on the pairs and draft again, this many times.")] = 0,
    hold_out: Annotated[
        float, typer.Option(min=0.01, max=0.99, help="Share of the prompts held out to compare the rounds.")
    ] = 0.2,
    settings: Annotated[
        Path | None, typer.Option(help="Settings file for the training of --rounds, as for pairtune tune.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Draft pairs without people: sample answers, rank them, and pair the best with the worst.

    With --rounds, each round's pairs come from the model of the round before, which is then trained further on them
    (online DPO by rounds). Each round has its share of the prompts; some are held out to compare every round with the
    beginning.
    """
    if out.exists():
        raise BadInput(f"--out {out}: already exists; choose another name, or remove it first")
    if not out.absolute().parent.is_dir():
        raise BadInput(f"--out {out}: the folder {out.absolute().parent} does not exist; create it first")

    with loading():
        from pairtune.draft import Drafting, draft_file, draft_rounds, judge_calls, read_prompts
        from pairtune.evaluation.judges import open_judge
        from pairtune.models.sampling import SamplingParams

    asked = read_prompts(prompts)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    how = Drafting(answers, open_judge(judge, judge_model), params)
    if judge.startswith("http"):
        calls = judge_calls(asked, answers, rounds, hold_out)
        if not yes:
            confirm({"calls": calls, "tokens": calls * (2 * max_tokens + 100)}, how.judge.name)
    console = screen(stderr=True)
    if rounds:
        share_processors(give_way=True)
        found = []
        for each in draft_rounds(model, asked, how, rounds, out, settings, console, hold_out):
            found.append(each.record())
            console.print(str(each), highlight=False)
        say(json.dumps({"out": str(out), "rounds": found}) if as_json else str(out / "rounds.json"))
        return
    drafted = draft_file(model, asked, how, out, console)
    if as_json:
        say(json.dumps({"out": str(out), "pairs": len(drafted.rows), "left_out": dict(drafted.left_out)}))
        return
    left_out = "".join(f", {count} left out: {reason}" for reason, count in drafted.left_out.items())
    say(f"{out}: {plural(len(drafted.rows), 'pair')} of {plural(len(asked), 'prompt')}{left_out}")
