"""Commands that train, and those that say beforehand what training would take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pairtune.cli.common import Json, columns_of, loading, output, say, share_processors
from pairtune.errors import BadInput
from pairtune.flags import WithSettings, WithSettingsHelp
from pairtune.open_data import probe, with_votes
from pairtune.screen import screen

if TYPE_CHECKING:
    from pairtune.run.folder import Run

training_app = typer.Typer()

DEMO = Path(__file__).parents[1] / "demo.yaml"

EXAMPLES = """
Examples:

pairtune tune --data pairs.jsonl

pairtune tune --data pairs.jsonl --lr 3e-5 --lr 1e-5 --beta 0.1 --beta 0.2 --out runs/grid

pairtune tune settings.yaml --data Dahoas/rm-static@train --eval-data Dahoas/rm-static@test --limit 1000
"""

# Options without a help text of their own are settings of a run; see `pairtune.flags`.


@training_app.command(cls=WithSettingsHelp)
def demo(out: Path = Path("runs/demo"), as_json: Json = False) -> None:
    """Run a small tuning job on the bundled model and pairs: needs no network and no data of your own."""
    _tune(DEMO, {"out": out}, as_json)


@training_app.command(cls=WithSettings, epilog=EXAMPLES)
def tune(
    context: typer.Context,
    config: Annotated[Path | None, typer.Argument(help="YAML file with settings; flags override it.")] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option(metavar="FLOAT", help="Mixing weight of each --data, in the same order.", rich_help_panel="Data"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train every trial of a grid from pristine weights and keep the best epoch of the best trial.

    Every setting is a flag, and a key in the YAML file; docs/settings.md explains each.
    """
    given = context.obj
    _tune(config, given | _weighted(given.get("data"), weight) | _columns(given), as_json)


@training_app.command(cls=WithSettings)
def plan(
    context: typer.Context,
    config: Annotated[Path | None, typer.Argument(help="YAML file with settings; flags override it.")] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes that will share the work, each with a device like this machine's.")
    ] = 1,
    as_json: Json = False,
) -> None:
    """Say what a run would read, how long it would take and how much memory, without starting it.

    Takes the settings of `tune`. Of a model, its config.json is enough; without --data it plans for pairs as long as
    --max-length allows.
    """
    _plan(config, context.obj | _columns(context.obj), processes, as_json)


@training_app.command(cls=WithSettingsHelp)
def doctor(
    model: Annotated[str, typer.Option(help="Model whose shapes are tested.")] = "smollm2-135m",
    max_length: Annotated[int, typer.Option(min=16)] = 1024,
    as_json: Json = False,
) -> None:
    """Describe this machine, what is chosen for it and why, and what is missing: the first thing for a bug report."""
    with loading():
        from pairtune.doctor import diagnose
        from pairtune.report.render_diagnosis import render_diagnosis
        from pairtune.run.records import dump

    with screen(stderr=True).status("examining this machine") as status:
        found = diagnose(model, max_length, status.update)
    say(json.dumps(dump(found))) if as_json else output().print(render_diagnosis(found), highlight=False)
    if not found.usable:
        raise typer.Exit(1)


@training_app.command()
def resume(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run that has not finished: its folder has no file COMPLETE.")
    ],
    as_json: Json = False,
) -> None:
    """Continue an interrupted or killed run from its last checkpoint."""
    from pairtune.run.folder import Run

    Run.started(run)  # before torch is imported

    share_processors(give_way=True)

    with loading():
        from pairtune.pipeline import resume

    _show(resume(run, screen(stderr=True)), as_json)


def _weighted(data: list[str] | None, weights: list[float] | None) -> dict[str, Any]:
    """The setting `data` with its weights, matched by order; empty if no weights are given."""
    if not weights:
        return {}
    if len(weights) != len(data or []):
        raise BadInput(
            f"--weight: {len(weights)} given for {len(data or [])} --data; give one weight per --data, or none"
        )
    return {"data": [{"source": name, "weight": weight} for name, weight in zip(data or [], weights, strict=True)]}


def _columns(settings: dict[str, Any]) -> dict[str, Any]:
    """The setting `columns`, of the settings of a command; empty if it names none."""
    named = columns_of(settings.get("columns"))
    return {"columns": named} if named else {}


def _tune(file: Path | None, flags: dict[str, Any], as_json: bool) -> None:
    from pairtune.api import settings_of

    resolved = settings_of(file, flags)  # before importing torch, so that a mistyped flag is reported at once
    share_processors(give_way=True)

    with loading():
        from pairtune.pipeline import tune

    _show(tune(resolved, screen(stderr=True)), as_json)


def _plan(file: Path | None, flags: dict[str, Any], processes: int, as_json: bool) -> None:
    from pairtune.resolve_config import read_settings, resolve

    has_data = "data" in flags or (file is not None and "data" in read_settings(file))
    config = with_votes(resolve(file, flags if has_data else flags | {"data": ["bundled:concise"]})).config
    if has_data:
        probe(config)

    share_processors(give_way=False)
    with loading():
        from pairtune.plan import plan_run
        from pairtune.report.render_plan import render_plan
        from pairtune.run.records import dump

    with screen(stderr=True).status("reading") as status:
        found = plan_run(config, status.update, has_data=has_data, processes=processes)
    say(json.dumps(dump(found))) if as_json else output().print(render_plan(found), highlight=False)


def _show(run: Run | None, as_json: bool) -> None:
    if run is None:
        return
    from pairtune.report.render_run import render_run

    if as_json:
        from pairtune.run.records import Selection, SweepRecord, dump

        selection, sweep = dump(run.need(Selection)), dump(run.need(SweepRecord))
        say(json.dumps({"run": str(run.root), "selection": selection, **sweep}))
    else:
        output().print(render_run(run))
