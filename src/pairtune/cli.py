"""The command line: wiring only. Heavy imports happen inside commands, so that `--help` answers at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from pairtune import __version__
from pairtune.errors import BadInput, RunFailed

# The base of every usage error. Typer carries its own copy of click and names only some of its exceptions.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

_INTERRUPTED = 130  # what Typer makes of Ctrl-C

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Tune a small language model to people's preferences, on the machine you have.",
)

DEMO = Path(__file__).with_name("demo.yaml")

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Out = Annotated[Path | None, typer.Option(help="Folder for the run; must not exist yet.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pairtune {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _app(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def demo(out: Out = Path("runs/demo"), as_json: Json = False) -> None:
    """The main job on the bundled model and pairs: no network, no data of your own."""
    _tune(DEMO, {"out": out}, as_json)


@app.command()
def tune(
    config: Annotated[Path | None, typer.Argument(help="YAML file with settings; flags win over it.")] = None,
    model: Annotated[str | None, typer.Option(help="Hub id, folder, .gguf file, or smollm2-135m (default).")] = None,
    data: Annotated[
        str | None, typer.Option(help="Pairs: .jsonl[.gz] or .parquet file, Hub id[@split], or bundled:concise.")
    ] = None,
    eval_data: Annotated[str | None, typer.Option(help="Validation pairs; else a tenth of the prompts.")] = None,
    lr: Annotated[list[float] | None, typer.Option(help="Learning rate; repeat for a grid.")] = None,
    beta: Annotated[list[float] | None, typer.Option(help="DPO's beta; repeat for a grid.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training pairs (3).")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pairs per step (2).")] = None,
    method: Annotated[str | None, typer.Option(help="lora (default) or full.")] = None,
    loss: Annotated[str | None, typer.Option(help="sigmoid (DPO, default), ipo, hinge, ...")] = None,
    engine: Annotated[str | None, typer.Option(help="trl.")] = None,
    limit: Annotated[int | None, typer.Option(help="Read at most this many rows of each source.")] = None,
    eval_limit: Annotated[int | None, typer.Option(help="The same for validation and test rows (--limit).")] = None,
    sanity_check: Annotated[
        bool | None, typer.Option("--sanity-check", help="Five rows, to see that everything works.")
    ] = None,
    on_bad_row: Annotated[str | None, typer.Option(help="stop (default) or skip, and count.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Drop pairs of more tokens than this (1024).")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto (default), float32 or bfloat16.")] = None,
    samples: Annotated[int | None, typer.Option(help="Held-out prompts answered before and after (8).")] = None,
    seed: Annotated[int | None, typer.Option(help="For everything that is drawn (0).")] = None,
    select: Annotated[str | None, typer.Option(help="eval_loss (default), accuracy or margin.")] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Train every trial of a grid from pristine weights and keep the best epoch of the best trial."""
    flags = {name: value for name, value in locals().items() if name not in ("config", "as_json", "lr")}
    _tune(config, {**flags, "learning_rate": lr or None, "beta": beta or None}, as_json)


@app.command()
def chat(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A finished run folder, or a model.")],
) -> None:
    """Talk to a tuned model in the terminal; /base and /tuned switch."""
    from rich.console import Console

    from pairtune.serve.terminal import chat

    chat(target, Console())


def _tune(file: Path | None, flags: dict[str, Any], as_json: bool) -> None:
    from rich.console import Console

    from pairtune.config import resolve

    resolved = resolve(file, flags)  # before torch is imported: a mistyped flag is answered at once
    if resolved.config.out.exists():
        from pairtune.runs import RunFolder

        RunFolder.create(resolved.config.out)

    from pairtune.pipeline import tune
    from pairtune.report.tables import render_run

    run = tune(resolved, Console(stderr=True))
    if as_json:
        selection, sweep = run.read_json(run.selection), run.read_json(run.sweep)
        typer.echo(json.dumps({"run": str(run.root), "selection": selection, **sweep}))
    else:
        Console(width=None if sys.stdout.isatty() else 140).print(render_run(run))


def main() -> NoReturn:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 bad input (one line, never a traceback)."""
    try:
        code = app(standalone_mode=False)
    except BadInput as error:
        _fail(str(error), 2)
    except _UsageError as error:
        _fail(error.format_message(), 2)  # type: ignore[attr-defined]
    except RunFailed as error:
        _fail(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    if code == _INTERRUPTED:
        _fail("interrupted; a run folder without COMPLETE is unfinished", 1)
    sys.exit(code or 0)


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
