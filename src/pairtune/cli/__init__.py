"""The command line: wiring only. Heavy imports happen inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from pairtune.cli.common import (
    Columns,
    Confirmed,
    Json,
    columns_of,
    confirm,
    loading,
    output,
    say,
    share_processors,
)
from pairtune.cli.data import data_app
from pairtune.cli.votes import votes_app
from pairtune.errors import BadInput, RunFailed, plural
from pairtune.extras import require
from pairtune.flags import WithSettings, WithSettingsHelp
from pairtune.open_data import check_choice, probe, with_votes
from pairtune.screen import harmless, screen
from pairtune.version import __version__

if TYPE_CHECKING:
    from pairtune.run.folder import Run

# The base class of usage errors. Typer bundles its own copy of click and exports only some of its exceptions.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

_LONG_NAME = 120  # characters of a name in an error message
_INTERRUPTED = 130  # Typer's exit code after Ctrl-C

app = typer.Typer(
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing rich takes as long as the rest of `--help`
    help="Tune a small language model to people's preferences, on the machine you have.",
)

app.add_typer(data_app, name="data")
app.add_typer(votes_app, name="votes")

DEMO = Path(__file__).parents[1] / "demo.yaml"

EXAMPLES = """
Examples:

pairtune tune --data pairs.jsonl

pairtune tune --data pairs.jsonl --lr 3e-5 --lr 1e-5 --beta 0.1 --beta 0.2 --out runs/grid

pairtune tune settings.yaml --data Dahoas/rm-static@train --eval-data Dahoas/rm-static@test --limit 1000
"""

# Options without a help text of their own are settings of a run; see `pairtune.flags`.
FinishedRun = Annotated[Path, typer.Argument(metavar="RUN", help="A finished run folder.")]
ExportedRun = Annotated[
    Path, typer.Argument(metavar="RUN[/TRIAL]", help="A finished run folder (its winner), or one of its trials.")
]
_FORMATS = ("adapter", "merged", "gguf")
_QUANTISATIONS = ("f16", "q8_0", "q4_k_m", "q4_1")
_QUANT_HELP = "Quantization of a GGUF file: f16, q8_0, q4_k_m (needs the extra llamacpp) or q4_1."
Quant = Annotated[str, typer.Option(help=_QUANT_HELP)]


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


@app.command(cls=WithSettingsHelp)
def demo(out: Path = Path("runs/demo"), as_json: Json = False) -> None:
    """Run a small tuning job on the bundled model and pairs: needs no network and no data of your own."""
    _tune(DEMO, {"out": out}, as_json)


@app.command(cls=WithSettings, epilog=EXAMPLES)
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


@app.command(cls=WithSettings)
def plan(
    context: typer.Context,
    config: Annotated[Path | None, typer.Argument(help="YAML file with settings; flags override it.")] = None,
    as_json: Json = False,
) -> None:
    """Say what a run would read, how long it would take and how much memory, without starting it.

    Takes the settings of `tune`. Of a model, its config.json is enough; without --data it plans for pairs as long as
    --max-length allows.
    """
    _plan(config, context.obj | _columns(context.obj), as_json)


@app.command(cls=WithSettingsHelp)
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


@app.command()
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


@app.command()
def audit(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="Run folder, trainer_state.json or its rows, .csv, or W&B run.")
    ],
    eval_rows: Annotated[
        int | None, typer.Option(min=1, help="Number of validation rows, if the log does not state it.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Evaluation batch size, if the log does not state it.")
    ] = None,
    beta: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[TRIAL=]FLOAT", help="DPO's beta, if the log does not state it; repeat for the trials, in order."
        ),
    ] = None,
    loss: Annotated[
        str | None, typer.Option(help="TRL's name of the loss (sigmoid is DPO's), if the log does not state it.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the findings to this file as well.")] = None,
    as_json: Json = False,
) -> None:
    """Find what is wrong with a run from its own numbers. Exit code 1 if there is an error."""
    from pairtune.api import audit as find_faults
    from pairtune.run.records import dump

    checked = find_faults(path, eval_rows=eval_rows, batch_size=batch_size, beta=beta, loss=loss)
    found = checked.record
    if beta and len(found.trials) > 1:
        known = (f"{name} {value:g}" for name, value in checked.betas.items())
        say(f"beta: {', '.join(known)}", err=True)
    if markdown:
        from pairtune.files import write_atomic
        from pairtune.report.render_audit import audit_markdown

        if markdown.is_dir() or not markdown.parent.is_dir():
            raise BadInput(f"--markdown {markdown}: is a folder, or in a folder that does not exist; name a file")
        write_atomic(markdown, audit_markdown(found))
    if as_json:
        say(json.dumps(dump(found)))
    else:
        output().print(checked.rendered(), highlight=False)
    if found.verdict == "error":
        raise typer.Exit(1)


@app.command()
def export(
    run: ExportedRun,
    to: Annotated[Path, typer.Option(help="Folder to write; must not exist yet.")],
    form: Annotated[str, typer.Option("--format", help="adapter (PEFT), merged (transformers) or gguf (llama.cpp).")],
    quant: Quant = "q8_0",
    as_json: Json = False,
) -> None:
    """Export a run's model for other tools, load the export, and check that it matches the trained model."""
    check_choice("--format", form, _FORMATS)
    check_choice("--quant", quant, _QUANTISATIONS)
    finished, trial = _finished(run)
    with loading():
        from pairtune.publish.export import export_run

    parity = export_run(finished, form, to, quant, trial)  # type: ignore[arg-type]
    if as_json:
        say(json.dumps({"to": str(to), **vars(parity)}))
        return
    say(
        f"{to}: same prompt tokens; log-probs differ by {parity.logp_difference:.2g} nats per token "
        f"({parity.tolerance:g} allowed); identical greedy answers: {parity.same_answers} of {parity.prompts}"
    )


@app.command()
def push(
    run: FinishedRun,
    repo: Annotated[
        str, typer.Option(metavar="USER/NAME", help="Repository on the Hub; created if it does not exist.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as private.")] = False,
    what: Annotated[str, typer.Option(help="What to publish: adapter, merged or gguf.")] = "adapter",
    quant: Quant = "q8_0",
    revision: Annotated[str | None, typer.Option(help="Branch to push to (default main).")] = None,
    anyway: Annotated[bool, typer.Option("--anyway", help="Publish even if the audit reports errors.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List every file and its size, upload nothing.")] = False,
    share_prompts: Annotated[
        bool | None,
        typer.Option(
            "--share-prompts/--no-share-prompts",
            help="Publish prompts, answers and pairs in card and report; else they stay (default as the run was set).",
        ),
    ] = None,
) -> None:
    """Publish a run's model with its card, report and figures on the Hugging Face Hub, in one commit."""
    check_choice("--what", what, _FORMATS)
    check_choice("--quant", quant, _QUANTISATIONS)
    finished = _whole_run(run)
    with loading():
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
        share_prompts=share_prompts,
    )
    for name, size in pushed.files.items():
        say(f"{size:>13,}  {name}", err=not dry_run)
    files = plural(len(pushed.files), "file")
    say(pushed.url or f"{sum(pushed.files.values()):>13,}  in {files}; nothing was uploaded")


@app.command("eval", cls=WithSettingsHelp)
def evaluate(
    target: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="A finished run, a LoRA adapter, or a model with --base.")
    ],
    data: Annotated[str, typer.Option(metavar="SRC", help="Pairs to evaluate on.")],
    base: Annotated[str | None, typer.Option(help="Base model to compare with; an adapter names its own.")] = None,
    beta: Annotated[float, typer.Option(help="Beta for losses and rewards, unless a run sets it.")] = 0.1,
    judge: Annotated[
        str,
        typer.Option(help="rule (counts faults of form), concise, a reward model, or an endpoint (http...)."),
    ] = "rule",
    judge_model: Annotated[str | None, typer.Option(help="Name of the judge model at the endpoint.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Confirm the cost of an endpoint, and named columns.")] = False,
    samples: Annotated[int, typer.Option(min=0, help="Prompts answered by both models and judged; 0 for none.")] = 32,
    limit: Annotated[int | None, typer.Option(min=1)] = None,
    columns: Columns = None,
    pairs: str = "best-worst",
    min_gap: float = 0.0,
    on_bad_row: str = "stop",
    dtype: str = "auto",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Evaluate a model on pairs: what it prefers, what it answers, and how often it wins against its base."""
    from pairtune.api import evaluate as evaluate_model
    from pairtune.run.records import dump

    found = evaluate_model(
        target,
        data,
        base=base,
        beta=beta,
        judge=judge,
        judge_model=judge_model,
        samples=samples,
        limit=limit,
        columns=columns_of(columns),
        pairs=pairs,  # type: ignore[arg-type]
        min_gap=min_gap,
        accept_columns=yes,
        on_bad_row=on_bad_row,  # type: ignore[arg-type]
        dtype=dtype,
        seed=seed,
        agree=lambda cost, name: None if yes else confirm(cost, name),
    )
    say(json.dumps(dump(found.record))) if as_json else output().print(found.rendered(), highlight=False)


@app.command(cls=WithSettingsHelp)
def compare(
    one: Annotated[str, typer.Argument(metavar="RUN_A", help="A run, RUN/TRIAL, an adapter, or their base model.")],
    other: Annotated[str, typer.Argument(metavar="RUN_B", help="What it is compared with.")],
    data: Annotated[str, typer.Option(metavar="SRC", help="Pairs to compare them on, which neither was trained on.")],
    beta: Annotated[float, typer.Option(help="Beta of the loss that decides.")] = 0.1,
    limit: Annotated[int | None, typer.Option(min=1)] = None,
    columns: Columns = None,
    pairs: str = "best-worst",
    min_gap: float = 0.0,
    yes: Confirmed = False,
    on_bad_row: str = "stop",
    dtype: str = "auto",
    as_json: Json = False,
) -> None:
    """Tell whether RUN_B is better than RUN_A: exit code 0 if it is better, 1 if worse, 2 if that cannot be told.

    Both are measured against the base model that they go back to, on the same pairs, and the difference of DPO's loss
    is tested pair by pair. Bad input has exit code 2 too, and no result.
    """
    from pairtune.api import compare as compare_models
    from pairtune.run.records import dump

    try:
        found = compare_models(
            one,
            other,
            data,
            beta=beta,
            limit=limit,
            columns=columns_of(columns),
            pairs=pairs,  # type: ignore[arg-type]
            min_gap=min_gap,
            accept_columns=yes,
            on_bad_row=on_bad_row,  # type: ignore[arg-type]
            dtype=dtype,
        )
    except RunFailed as error:  # not 1, which says that RUN_B is worse
        raise BadInput(str(error)) from error
    say(json.dumps(dump(found.record))) if as_json else output().print(found.rendered(), highlight=False)
    raise typer.Exit({"better": 0, "worse": 1}.get(found.record.outcome, 2))


@app.command()
def report(run: FinishedRun) -> None:
    """Write a run's report.html, report.md and model card again."""
    from pairtune.report.write import write_report

    finished = _whole_run(run)
    write_report(finished)
    say(str(finished.paths.report))


@app.command()
def chat(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A finished run folder, or a model.")],
) -> None:
    """Chat with a tuned model in the terminal; /base and /tuned switch between models."""
    with loading():
        from pairtune.serve.terminal import chat

    chat(target, screen())


Served = Annotated[
    list[str] | None,
    typer.Argument(metavar="[RUN|MODEL]...", help="Finished runs, adapters or models; default: every run in --runs."),
]
RunsRoot = Annotated[Path, typer.Option("--runs", help="Folder of the runs to show.")]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests that one model answers at once.")]
Waiting = Annotated[int, typer.Option(min=1, help="Further requests that may wait in the queue.")]
Context = Annotated[int, typer.Option(min=64, help="Maximum tokens of a conversation, answer included.")]


@app.command()
def worker(
    targets: Served = None,
    runs: RunsRoot = Path("runs"),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the API.")] = 8001,
    concurrency: Concurrency = 8,
    waiting: Waiting = 64,
    context: Context = 4096,
    attached: Annotated[bool, typer.Option("--attached", hidden=True, help="Exit when standard input closes.")] = False,
) -> None:
    """Serve only the models, over OpenAI's API (/v1/chat/completions); `serve` starts a worker of its own."""
    require("serve", "pairtune worker")
    share_processors(give_way=False)

    from pairtune.serve.request import Limits
    from pairtune.serve.worker import run_worker

    run_worker(
        targets or [], None if targets else runs, host, port, Limits(concurrency, waiting, context), attached=attached
    )


@app.command()
def serve(
    targets: Served = None,
    runs: RunsRoot = Path("runs"),
    host: Annotated[
        str, typer.Option(help="Address to listen on; on any but the default, people enter with keys that it shows.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the site.")] = 8000,
    backend: Annotated[
        str | None, typer.Option(help="OpenAI-style server to use instead: vLLM, llama.cpp, Ollama.")
    ] = None,
    concurrency: Concurrency = 8,
    waiting: Waiting = 64,
    context: Context = 4096,
    matches: Annotated[
        str, typer.Option(help="Who meets in the arena: informative, where a vote tells most, or uniform, by lot.")
    ] = "informative",
    cert: Annotated[Path | None, typer.Option(help="TLS certificate (PEM), to encrypt the connection.")] = None,
    key: Annotated[Path | None, typer.Option(help="The certificate's private key (PEM).")] = None,
    new_keys: Annotated[
        bool, typer.Option("--new-keys", help="With --host: replace the keys by which people enter.")
    ] = False,
) -> None:
    """Start the site at http://localhost:8000/: chat with tuned models, watch runs, look at pairs."""
    require("serve", "pairtune serve")
    check_choice("--matches", matches, ("informative", "uniform"))
    os.environ["PAIRTUNE_MATCHES"] = matches
    from pairtune.web.server import serve

    if (cert is None) != (key is None):
        raise BadInput("--cert and --key: belong together; give both")
    limits = {"--concurrency": concurrency, "--waiting": waiting, "--context": context}
    options = [part for flag, value in limits.items() for part in (flag, str(value))]
    tls = (cert, key) if cert and key else None
    serve(targets or [], runs, host, port, backend, options, tls, new_keys)


def _finished(path: Path) -> tuple[Run, str | None]:
    """The finished run that a path names, and the trial if it names one of its trials."""
    from pairtune.run.folder import Run, find_run

    run, trial = find_run(path) or (Run(path), None)
    return Run.finished(run.root), trial


def _whole_run(path: Path) -> Run:
    run, trial = _finished(path)
    if trial:
        raise BadInput(f"{path}: is a single trial; give its run, {run.root}")
    return run


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


def _plan(file: Path | None, flags: dict[str, Any], as_json: bool) -> None:
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
        found = plan_run(config, status.update, has_data=has_data)
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


def main() -> NoReturn:
    """Run the command line. Exit codes: 0 success, 1 failure, 2 bad input (one line, never a traceback)."""
    try:
        code = app(standalone_mode=False)
    except BadInput as error:
        _fail(str(error), 2)
    except _UsageError as error:
        _fail(error.format_message(), 2)  # type: ignore[attr-defined]
    except RunFailed as error:
        _fail(str(error), 1)
    except OSError as error:
        _fail_of_file(error)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    if code == _INTERRUPTED:
        _fail("interrupted; `pairtune resume RUN` continues a run folder that has no COMPLETE", 1)
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
