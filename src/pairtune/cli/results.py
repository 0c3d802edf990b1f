"""Commands for what a run has come to: its faults, exports, publication, evaluation and report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pairtune.cli.common import Columns, Confirmed, Json, columns_of, confirm, loading, output, say
from pairtune.errors import BadInput, RunFailed, plural
from pairtune.flags import WithSettingsHelp
from pairtune.open_data import check_choice

if TYPE_CHECKING:
    from pairtune.run.folder import Run

results_app = typer.Typer()

# Options without a help text of their own are settings of a run; see `pairtune.flags`.
FinishedRun = Annotated[Path, typer.Argument(metavar="RUN", help="A finished run folder.")]
ExportedRun = Annotated[
    Path, typer.Argument(metavar="RUN[/TRIAL]", help="A finished run folder (its winner), or one of its trials.")
]
_FORMATS = ("adapter", "merged", "gguf")
_QUANTISATIONS = ("f16", "q8_0", "q4_k_m", "q4_1")
_QUANT_HELP = "Quantization of a GGUF file: f16, q8_0, q4_k_m (needs the extra llamacpp) or q4_1."
Quant = Annotated[str, typer.Option(help=_QUANT_HELP)]


@results_app.command()
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


@results_app.command()
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


@results_app.command()
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


@results_app.command("eval", cls=WithSettingsHelp)
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


@results_app.command(cls=WithSettingsHelp)
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


@results_app.command()
def report(run: FinishedRun) -> None:
    """Write a run's report.html, report.md and model card again."""
    from pairtune.report.write import write_report

    finished = _whole_run(run)
    write_report(finished)
    say(str(finished.paths.report))


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
