"""The command line: wiring only. Heavy imports happen inside commands, so that `--help` answers at once."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from pairtune import __version__
from pairtune.errors import BadInput, RunFailed
from pairtune.extras import require
from pairtune.flags import WithSettings, WithSettingsHelp

if TYPE_CHECKING:
    from rich.console import Console

    from pairtune.data.source_reader import SourceReader
    from pairtune.run.folder import Run

# The base of every usage error. Typer carries its own copy of click and names only some of its exceptions.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

_INTERRUPTED = 130  # what Typer makes of Ctrl-C

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing rich takes as long as all the rest of `--help`
    help="Tune a small language model to people's preferences, on the machine you have.",
)

data_app = typer.Typer(
    help="Look at preference data before training on it.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(data_app, name="data")

DEMO = Path(__file__).with_name("demo.yaml")

EXAMPLES = """
Examples:

pairtune tune --data pairs.jsonl

pairtune tune --data pairs.jsonl --lr 3e-5 --lr 1e-5 --beta 0.1 --beta 0.2 --out runs/grid

pairtune tune settings.yaml --data Dahoas/rm-static@train --eval-data Dahoas/rm-static@test --limit 1000
"""

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
# Options without help of their own are settings of a run; see `pairtune.flags`.
Columns = Annotated[list[str] | None, typer.Option("--column")]
SourceArgument = Annotated[
    str,
    typer.Argument(metavar="SRC", help="As tune's --data: a file, a folder, a Hub id, bundled:concise."),
]
FinishedRun = Annotated[Path, typer.Argument(metavar="RUN", help="A finished run folder.")]
ExportedRun = Annotated[
    Path, typer.Argument(metavar="RUN[/TRIAL]", help="A finished run folder: its winner, or one trial of it.")
]
_FORMATS = ("adapter", "merged", "gguf")
_QUANTISATIONS = ("f16", "q8_0", "q4_1")
Quant = Annotated[str, typer.Option(help="Of a GGUF file: f16, q8_0 or q4_1.")]


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


@app.command(cls=WithSettingsHelp)
def demo(out: Path = Path("runs/demo"), as_json: Json = False) -> None:
    """The main job on the bundled model and pairs: no network, no data of your own."""
    _tune(DEMO, {"out": out}, as_json)


@app.command(cls=WithSettings, epilog=EXAMPLES)
def tune(
    context: typer.Context,
    config: Annotated[Path | None, typer.Argument(help="YAML file with settings; flags win over it.")] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option(metavar="FLOAT", help="Of each --data, in their order; sets the mix.", rich_help_panel="Data"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train every trial of a grid from pristine weights and keep the best epoch of the best trial.

    Every setting has a flag, and its name in a YAML file; docs/settings.md explains each.
    """
    given = context.obj
    _tune(config, given | _weighted(given.get("data"), weight) | _columns(given.get("columns")), as_json)


@app.command(cls=WithSettingsHelp)
def doctor(
    model: Annotated[str, typer.Option(help="Whose shapes are tried.")] = "smollm2-135m",
    max_length: Annotated[int, typer.Option(min=16)] = 1024,
    as_json: Json = False,
) -> None:
    """What this machine is, what is chosen for it and why, and what is missing: the first thing for a bug report."""
    from rich.console import Console

    from pairtune.doctor import diagnose
    from pairtune.report.render_diagnosis import render_diagnosis
    from pairtune.run.records import dump

    with Console(stderr=True).status("looking") as status:
        found = diagnose(model, max_length, status.update)
    typer.echo(json.dumps(dump(found))) if as_json else _output().print(render_diagnosis(found), highlight=False)
    if not found.usable:
        raise typer.Exit(1)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder without COMPLETE.")], as_json: Json = False
) -> None:
    """Go on with a run that was interrupted or killed, from its last checkpoint."""
    from pairtune.run.folder import Run

    Run.started(run)  # before torch is imported

    from rich.console import Console

    _share_processors(give_way=True)

    from pairtune.pipeline import resume

    _show(resume(run, Console(stderr=True)), as_json)


@app.command()
def audit(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="Run folder, trainer_state.json, .csv, or W&B offline run.")
    ],
    eval_rows: Annotated[int | None, typer.Option(min=1, help="Validation rows, where the log does not say.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Of the evaluation, where the log does not say.")
    ] = None,
    beta: Annotated[list[float] | None, typer.Option(help="DPO's beta, where the log does not say; repeat.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the findings to this file as well.")] = None,
    as_json: Json = False,
) -> None:
    """Find in a run's own numbers what is wrong with it. Exit code 1 when an error is found."""
    from pairtune.evaluate.audit.check import audit
    from pairtune.evaluate.audit.foreign import with_options
    from pairtune.evaluate.audit.read import read_evidence
    from pairtune.report.render_audit import audit_markdown, render_audit
    from pairtune.run.records import dump

    found = audit(with_options(read_evidence(path), eval_rows, batch_size, beta))
    if markdown:
        from pairtune.files import write_atomic

        write_atomic(markdown, audit_markdown(found))
    if as_json:
        typer.echo(json.dumps(dump(found)))
    else:
        _output().print(render_audit(found), highlight=False)
    if found.verdict == "error":
        raise typer.Exit(1)


@app.command()
def export(
    run: ExportedRun,
    to: Annotated[Path, typer.Option(help="Folder for it; must not exist yet.")],
    form: Annotated[str, typer.Option("--format", help="adapter (PEFT), merged (transformers) or gguf (llama.cpp).")],
    quant: Quant = "q8_0",
    as_json: Json = False,
) -> None:
    """Write a run's model for other tools, load it again, and check that it is the trained one."""
    _check_choice("--format", form, _FORMATS)
    _check_choice("--quant", quant, _QUANTISATIONS)
    finished, trial = _finished(run)
    from pairtune.publish.export import export_run

    parity = export_run(finished, form, to, quant, trial)  # type: ignore[arg-type]
    if as_json:
        typer.echo(json.dumps({"to": str(to), **vars(parity)}))
        return
    typer.echo(
        f"{to}: same prompt tokens; a token's log-prob differs by {parity.logp_difference:.2g} nats "
        f"({parity.tolerance:g} allowed); {parity.same_answers} of {parity.prompts} greedy answers are the same"
    )


@app.command()
def push(
    run: FinishedRun,
    repo: Annotated[str, typer.Option(metavar="USER/NAME", help="On the Hub; made where it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Where the repository is made.")] = False,
    what: Annotated[str, typer.Option(help="adapter (default), merged or gguf.")] = "adapter",
    quant: Quant = "q8_0",
    revision: Annotated[str | None, typer.Option(help="Branch (main).")] = None,
    anyway: Annotated[bool, typer.Option("--anyway", help="Also what the audit calls wrong.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List every file and its size, and send nothing.")] = False,
) -> None:
    """Publish a run's model with card, report and figures on the Hugging Face Hub, in one commit."""
    _check_choice("--what", what, _FORMATS)
    _check_choice("--quant", quant, _QUANTISATIONS)
    finished = _whole_run(run)
    from pairtune.publish.hub import push_run

    pushed = push_run(
        finished,
        repo,
        what,  # type: ignore[arg-type]
        quant,  # type: ignore[arg-type]
        private=private,
        revision=revision,
        anyway=anyway,
        dry_run=dry_run,
    )
    for name, size in pushed.files.items():
        typer.echo(f"{size:>13,}  {name}", err=not dry_run)
    typer.echo(pushed.url or f"{sum(pushed.files.values()):>13,}  in {len(pushed.files)} files; nothing was sent")


@app.command("eval", cls=WithSettingsHelp)
def evaluate(
    target: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="A finished run, a LoRA adapter, or a model with --base.")
    ],
    data: Annotated[str, typer.Option(metavar="SRC", help="Pairs to judge it on.")],
    base: Annotated[str | None, typer.Option(help="What to compare with; an adapter names its own.")] = None,
    beta: Annotated[float, typer.Option(help="For losses and rewards of a model not tuned here.")] = 0.1,
    judge: Annotated[str, typer.Option(help="rule, a reward model, or an OpenAI-style endpoint (http...).")] = "rule",
    judge_model: Annotated[str | None, typer.Option(help="The judge's name at the endpoint.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Ask the endpoint without showing the cost first.")] = False,
    samples: Annotated[int, typer.Option(min=0, help="Prompts answered by both and judged; 0: none.")] = 32,
    limit: Annotated[int | None, typer.Option(min=1)] = None,
    columns: Columns = None,
    on_bad_row: str = "stop",
    dtype: str = "auto",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Judge a model on pairs: what it prefers, what it answers, and how often it wins over its base."""
    _check_choice("--on-bad-row", on_bad_row, ("stop", "skip"))
    _check_choice("--dtype", dtype, ("auto", "float32", "bfloat16"))
    if not 0 < beta < float("inf"):
        raise BadInput(f"--beta: must be greater than 0, not {beta:g}")
    reader = _open_reader(data, columns, limit, "--data")

    import tempfile

    from rich.console import Console

    from pairtune.evaluate.judges import open_judge
    from pairtune.evaluate.model import answer_prompts, evaluate_pairs, open_candidate, read_pairs
    from pairtune.report.render_evaluation import render_evaluation
    from pairtune.run.records import dump

    console = Console(stderr=True)
    judging = open_judge(judge, judge_model)
    candidate = open_candidate(target, base, beta, dtype)
    with tempfile.TemporaryDirectory(prefix="pairtune-") as folder:
        with console.status("reading pairs") as status:
            pairs, rows = read_pairs(candidate, reader, on_bad_row, Path(folder))  # type: ignore[arg-type]
            status.update("evaluating")
            total = len(pairs)
            found = evaluate_pairs(
                candidate, pairs, rows, lambda done: status.update(f"evaluating: {done:,}/{total:,}")
            )
            if samples:
                answered = answer_prompts(
                    candidate, pairs, samples, seed, lambda name, done: status.update(f"answering: {name} {done}")
                )
        if samples:
            if (cost := answered.cost(judging)) and not yes:
                _confirm(cost, judging.name)
            with console.status("judging") as status:
                judged = answered.judged(judging, lambda done: status.update(f"judging: {done}"))
            found = found.model_copy(update={"answers": judged})
    typer.echo(json.dumps(dump(found))) if as_json else _output().print(render_evaluation(found), highlight=False)


def _confirm(cost: dict[str, int], judge: str) -> None:
    """Show what an endpoint will be asked, and go on only with a yes."""
    asked = f"{cost['calls']} calls with about {cost['tokens']:,} tokens go to {judge}"
    if not cost["calls"]:
        return
    if not sys.stdin.isatty():
        raise BadInput(f"--yes: is needed where nobody can be asked; {asked}")
    typer.confirm(f"{asked}. Go on?", abort=True, err=True)


@app.command()
def report(run: FinishedRun) -> None:
    """Write report.html, report.md and the model card of a run again."""
    from pairtune.report.write import write_report

    finished = _whole_run(run)
    write_report(finished)
    typer.echo(str(finished.paths.report))


@app.command()
def chat(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A finished run folder, or a model.")],
) -> None:
    """Talk to a tuned model in the terminal; /base and /tuned switch."""
    from rich.console import Console

    from pairtune.serve.terminal import chat

    chat(target, Console())


Served = Annotated[
    list[str] | None,
    typer.Argument(metavar="[RUN|MODEL]...", help="Finished runs, adapters, models; else every run in --runs."),
]
RunsRoot = Annotated[Path, typer.Option("--runs", help="Folder of the runs that the site shows.")]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests answered at once, by one model.")]
Waiting = Annotated[int, typer.Option(min=1, help="Requests that may wait beyond these.")]
Context = Annotated[int, typer.Option(min=64, help="Tokens of a conversation with its answer.")]


@app.command()
def worker(
    targets: Served = None,
    runs: RunsRoot = Path("runs"),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Of the API.")] = 8001,
    concurrency: Concurrency = 8,
    waiting: Waiting = 64,
    context: Context = 4096,
    attached: Annotated[bool, typer.Option("--attached", hidden=True, help="End with standard input.")] = False,
) -> None:
    """Only the models, behind OpenAI's API (/v1/chat/completions); `serve` starts one of its own."""
    require("serve", "pairtune worker")
    _share_processors(give_way=False)

    from pairtune.serve.request import Limits
    from pairtune.serve.worker import run_worker

    run_worker(
        targets or [], None if targets else runs, host, port, Limits(concurrency, waiting, context), attached=attached
    )


@app.command()
def serve(
    targets: Served = None,
    runs: RunsRoot = Path("runs"),
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine see what you serve.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Of the site.")] = 8000,
    backend: Annotated[
        str | None, typer.Option(help="An OpenAI-style server instead: vLLM, llama.cpp, Ollama.")
    ] = None,
    concurrency: Concurrency = 8,
    waiting: Waiting = 64,
    context: Context = 4096,
) -> None:
    """The site: chat with what was tuned, watch runs, look at pairs. At http://localhost:8000/."""
    require("serve", "pairtune serve")
    from pairtune.web.server import serve

    limits = {"--concurrency": concurrency, "--waiting": waiting, "--context": context}
    options = [part for flag, value in limits.items() for part in (flag, str(value))]
    serve(targets or [], runs, host, port, backend, options)


@data_app.command("inspect", cls=WithSettingsHelp)
def inspect(
    source: SourceArgument,
    model: Annotated[str, typer.Option(help="Whose tokenizer and chat template are used.")] = "smollm2-135m",
    max_length: Annotated[int, typer.Option(min=16)] = 1024,
    limit: Annotated[int | None, typer.Option(min=1)] = None,
    columns: Columns = None,
    figures: Annotated[Path | None, typer.Option(help="Folder for the histograms as PNG.")] = None,
    as_json: Json = False,
) -> None:
    """Say what a source holds, what is wrong with it, and what a model would see. Exit code 2 when it is not usable."""
    reader = _open_reader(source, columns, limit)

    from rich.console import Console

    from pairtune.data.inspect_source import inspect_source
    from pairtune.models.load import load_tokenizer
    from pairtune.models.resolve import resolve_model
    from pairtune.report.render_inspection import render_inspection
    from pairtune.run.records import dump

    with Console(stderr=True).status("reading") as status:
        tokenizer = load_tokenizer(resolve_model(model))
        found = inspect_source(reader, tokenizer, max_length, lambda rows: status.update(f"reading: {rows:,} rows"))
    drawn = {}
    if figures and found.kept:
        from pairtune.report.figures import draw_lengths

        drawn = {"figures": [str(draw_lengths(found, figures / "lengths.png"))]}
    if as_json:
        typer.echo(json.dumps(dump(found) | drawn))
    else:
        _output().print(render_inspection(found), highlight=False)
    if found.verdict == "not usable":
        raise typer.Exit(2)


@data_app.command("convert", cls=WithSettingsHelp)
def convert(
    source: SourceArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new .jsonl or .parquet file.")],
    limit: Annotated[int | None, typer.Option(min=1)] = None,
    columns: Columns = None,
    on_bad_row: str = "stop",
    as_json: Json = False,
) -> None:
    """Write a source in TRL's conversational format."""
    _check_choice("--on-bad-row", on_bad_row, ("stop", "skip"))
    reader = _open_reader(source, columns, limit)

    from pairtune.data.convert import convert_source
    from pairtune.run.records import dump

    account = convert_source(reader, out, on_bad_row).account()  # type: ignore[arg-type]
    if as_json:
        typer.echo(json.dumps({"out": str(out), **dump(account)}))
        return
    dropped = "".join(f", {rows:,} {reason}" for reason, rows in account.dropped.items())
    typer.echo(f"{out}: {account.kept:,} pairs of {account.rows_in:,} rows{dropped}")


def _finished(path: Path) -> tuple[Run, str | None]:
    """The finished run in a folder, and the trial where one of its trials was named."""
    from pairtune.run.folder import Run, find_run

    run, trial = find_run(path) or (Run(path), None)
    return Run.finished(run.root), trial


def _whole_run(path: Path) -> Run:
    run, trial = _finished(path)
    if trial:
        raise BadInput(f"{path}: is one trial; give its run, {run.root}")
    return run


def _check_choice(flag: str, given: str, choices: tuple[str, ...]) -> None:
    if given not in choices:
        raise BadInput(f"{flag}: should be {', '.join(choices[:-1])} or {choices[-1]} (given: {given!r})")


def _open_reader(source: str, columns: list[str] | None, limit: int | None, flag: str = "SRC") -> SourceReader:
    from pairtune.config import SourceConfig
    from pairtune.data.source_reader import SourceReader

    return SourceReader.open(SourceConfig(source=source), flag, _columns(columns).get("columns", {}), limit)


def _weighted(data: list[str] | None, weights: list[float] | None) -> dict[str, Any]:
    """The setting `data` where sources have weights, in their order."""
    if not weights:
        return {}
    if len(weights) != len(data or []):
        raise BadInput(f"--weight: {len(weights)} given for {len(data or [])} --data; give one for each, or none")
    return {"data": [{"source": name, "weight": weight} for name, weight in zip(data or [], weights, strict=True)]}


def _columns(given: list[str] | None) -> dict[str, Any]:
    """The setting `columns` out of `PART=NAME` texts."""
    columns = {}
    for text in given or []:
        part, equals, name = text.partition("=")
        if part not in ("prompt", "chosen", "rejected", "system") or not (equals and name):
            raise BadInput(f"--column {text}: should be prompt=NAME, chosen=NAME, rejected=NAME or system=NAME")
        columns[part] = name
    return {"columns": columns} if columns else {}


def _output() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140)


def _tune(file: Path | None, flags: dict[str, Any], as_json: bool) -> None:
    from rich.console import Console

    from pairtune.config import resolve

    resolved = resolve(file, flags)  # before torch is imported: a mistyped flag is answered at once
    from pairtune.run.folder import check_new

    check_new(resolved.config.out)
    _share_processors(give_way=True)

    from pairtune.pipeline import tune

    _show(tune(resolved, Console(stderr=True)), as_json)


def _share_processors(*, give_way: bool) -> None:
    """Settle before torch is imported, which reads it, how threads wait for each other, and who goes first.

    Threads that spin are a third faster alone, and many times slower beside another program that computes (LOG.md).

    Args:
        give_way: to what people wait for: a chat beside a training is answered, and the training loses little.
    """
    from pairtune.environment import others_are_busy

    if others_are_busy():
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if give_way:
        with suppress(OSError, AttributeError):
            os.nice(10)


def _show(run: Run | None, as_json: bool) -> None:
    if run is None:
        return
    from pairtune.report.render_run import render_run

    if as_json:
        from pairtune.run.records import Selection, SweepRecord, dump

        selection, sweep = dump(run.need(Selection)), dump(run.need(SweepRecord))
        typer.echo(json.dumps({"run": str(run.root), "selection": selection, **sweep}))
    else:
        _output().print(render_run(run))


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
        _fail("interrupted; `pairtune resume RUN` goes on with a run folder without COMPLETE", 1)
    sys.exit(code or 0)


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
