"""A run's result for the terminal: a table per trial, the winner and why, answers before and after."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pairtune.environment import program
from pairtune.errors import plural
from pairtune.report.phrases import differs, p_value
from pairtune.report.render_audit import render_findings
from pairtune.report.report_data import COLUMNS, BeforeAfter, ReportData
from pairtune.run.folder import Run
from pairtune.run.records import DataRecord, Generations, Selection, TestRecord, TrialRecord

EXAMPLES = 3


def render_run(run: Run) -> RenderableType:
    """The full result of a finished run."""
    found = ReportData(run)
    parts: list[RenderableType] = [render_data(found.data)]
    for name, record in found.records.items():
        parts.append(render_trial(record, winner=name == found.selection.winner))
    parts.append(render_selection(found.selection))
    if found.test:
        parts.append(render_test(found.test))
    if found.audit:
        parts.append(render_findings(found.audit))
    if found.generations:
        parts.append(render_generations(found.generations, found.selection.winner, found.answers))
    parts.append(Text.assemble("\n", ("Next\n", "bold"), *_next_commands(run)))
    return Group(*parts)


def render_data(data: DataRecord) -> RenderableType:
    """Rows in = kept + dropped by reason, one line per source."""
    lines = [("Data\n", "bold")]
    for source in data.sources:
        parts = [f"{source.split}: {plural(source.rows_in, 'row')} of {source.source}", f"{source.kept:,} kept"]
        if source.shortened:
            parts.append(f"{source.shortened:,} of these without their oldest turns")
        parts += [f"{rows:,} dropped: {reason}" for reason, rows in source.dropped.items()]
        lines.append((f"  {', '.join(parts)}\n", ""))
    return Text.assemble(*lines)


def render_trial(record: TrialRecord, *, winner: bool) -> RenderableType:
    """One trial's table: a row per epoch, the kept epoch marked."""
    varied = [f"{name}={getattr(record.trial, name)}" for name in record.trial.varied]
    title = ", ".join([f"lr={record.learning_rate:g}", f"beta={record.beta:g}", *varied])
    table = Table(title=f"{title} (winner)" if winner else title, title_justify="left", title_style="bold")
    table.add_column("Epoch")
    for heading, _ in COLUMNS:
        table.add_column(heading.replace("/", "/\n").replace(" ", "\n"), justify="right")
    for row in record.epochs:
        best = row.epoch == record.best_epoch
        cells = [f"{row.metric(metric):.6f}" for _, metric in COLUMNS]
        table.add_row(f"{row.epoch}{' *' if best else ''}", *cells, style="bold" if best else "")
    if record.status != "finished":
        return Group(table, Text(f"  {record.status}: {record.reason}", style="red"))
    others = record.side_by_side - 1
    beside = f" beside {plural(others, 'other trial')}" if others else ""
    speed = (
        f"  * kept; {record.train_seconds:.0f} s of training{beside}, "
        f"{record.train_pairs_per_second:.2f} pairs/s, peak memory {record.peak_memory_mb} MB"
    )
    return Group(table, Text(speed, style="dim"), Text(""))


def render_selection(selection: Selection) -> RenderableType:
    """The ranking with its intervals, the winner and why, and whether the data supports the selection."""
    evaluated = plural(selection.validation_pairs, f"validation {selection.noun}")
    table = Table(
        title=f"Best epochs on {evaluated}, with 95% intervals",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("Trial", overflow="fold")
    table.add_column("Epoch")
    for heading in ("Loss", "Accuracy", "Margin"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("Differs from\nthe winner")
    table.add_column("Better than\nthe base")
    compared = {entry.name: entry for entry in selection.comparisons}
    for place, entry in enumerate(selection.ranking):
        table.add_row(
            entry.name,
            str(entry.best_epoch),
            *(entry.with_interval(f"eval_{name}") for name in ("loss", "rewards/accuracies", "rewards/margins")),
            differs(compared.get(entry.name)),
            "yes" if entry.against_base.better else "not shown",
            style="bold" if place == 0 else "",
        )
    text = Text.assemble(("Winner\n", "bold"), f"  {selection.why}\n", (f"  {selection.verdict}\n", "cyan"))
    for warning in selection.warnings:
        text.append(f"  note: {warning}\n", style="yellow")
    return Group(table, Text(""), text)


def render_test(test: TestRecord) -> RenderableType:
    """The test evaluation."""
    numbers = ", ".join(
        f"{title} {test.with_interval(f'eval_{name}')}"
        for title, name in (("loss", "loss"), ("accuracy", "rewards/accuracies"), ("margin", "rewards/margins"))
    )
    better = "better than the base" if test.against_base.better else "not shown to be better than the base"
    return Text.assemble(
        (f"Test on {plural(test.pairs, test.examples.noun)} not used for training or selection\n", "bold"),
        f"  {test.trial}, epoch {test.epoch}: {numbers}; {better} ({p_value(test.against_base.p)})\n",
    )


def render_generations(generations: Generations, winner: str, answers: list[BeforeAfter]) -> RenderableType:
    """Length and completeness of every model's answers, and a few answers before and after tuning."""
    limit, prompts = generations.sampling.max_new_tokens, plural(len(generations.prompts), "held-out prompt")
    table = Table(title=f"Answers to {prompts}", title_justify="left", title_style="bold")
    table.add_column("Model")
    for heading in ("Median\ntokens", f"Ended with EOS\nwithin {limit} tokens", "Repeated\nphrases"):
        table.add_column(heading, justify="right")
    for name, model in generations.models.items():
        numbers = model.summary
        table.add_row(
            f"{name} (winner)" if name == winner else name,
            f"{numbers.median_tokens:.0f}",
            f"{numbers.ended_share:.0%}",
            f"{numbers.repeated_share:.0%}",
            style="bold" if name == winner else "",
        )
    return Group(table, Text(""), *_examples(answers[:EXAMPLES]))


def _examples(answers: list[BeforeAfter]) -> Iterator[RenderableType]:
    for each in answers:
        yield Text(each.prompt, "bold")
        for label, answer in (("before", each.base), ("after", each.tuned)):
            end = "complete" if answer.ended else "cut off"
            yield Text.assemble(
                (f"  {label} ", "cyan"), (f"({plural(answer.tokens, 'token')}, {end})\n", "dim"), answer.text
            )
        yield Text("")


def _next_commands(run: Run) -> list[str]:
    called = program()
    served = "" if run.root.resolve().parent == Path("runs").resolve() else f" {run.root}"
    steps = [
        (str(run.paths.report), "curves, answers side by side, audit findings"),
        (f"{called} serve{served}", "the same in a browser, and a chat with the tuned model beside its base"),
        (f"{called} chat {run.root}", "that chat in this terminal"),
        (f"{called} tune {run.paths.config} --out NEW", "run it again; flags override its settings"),
    ]
    width = max(len(step) for step, _ in steps)
    return [f"  {step:<{width}}  {what}\n" for step, what in steps]
