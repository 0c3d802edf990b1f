"""The result of `pairtune eval`, for the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pairtune.errors import plural
from pairtune.evaluation.winrate import RuleJudge
from pairtune.report.phrases import p_value
from pairtune.run.records import ComparedModels, EvaluationReport, JudgedAnswers, Share

_SHOWN = (
    ("Loss", "eval_loss"),
    ("Accuracy", "eval_rewards/accuracies"),
    ("Margin", "eval_rewards/margins"),
    ("Margin per token (nats)", "eval_logps/margins_per_token"),
)
_COUNTED = (
    ("median tokens", "median_tokens", "{:.0f}"),
    ("ended with EOS", "ended_share", "{:.0%}"),
    ("empty", "empty_share", "{:.0%}"),
    ("repeated phrases", "repeated_share", "{:.0%}"),
    ("refused", "refused_share", "{:.0%}"),
    ("in another language", "other_language_share", "{:.0%}"),
)


def render_comparison(found: ComparedModels) -> RenderableType:
    """What `pairtune compare` has found."""
    table = Table(box=None, pad_edge=False)
    for name in ("", found.one, found.other, "difference (95 %)", ""):
        table.add_column(name)
    for name, metric in (("loss", found.loss), ("accuracy", found.accuracy)):
        low, high = metric.interval
        table.add_row(
            name,
            f"{metric.one:.4f}",
            f"{metric.other:.4f}",
            f"{metric.difference:+.4f} ({low:+.4f} to {high:+.4f})",
            p_value(metric.p),
        )
    told = {
        "better": f"{found.other} is better than {found.one}.",
        "worse": f"{found.other} is worse than {found.one}.",
    }.get(found.outcome, "Which of the two is better cannot be told from these pairs.")
    if found.needed:
        told += f" About {plural(found.needed, 'pair')} would show a difference like this one."
    basis = (
        f"{plural(found.pairs, 'pair')} in {plural(found.conversations, 'conversation')}, measured against "
        f"{found.base} with beta {found.beta:g}."
    )
    return Group(table, "", f"{told} {basis}")


def render_evaluation(found: EvaluationReport) -> RenderableType:
    """Preference metrics with their intervals, and answers with their win rate."""
    rows = found.data
    dropped = "".join(f", {count:,} dropped: {reason}" for reason, count in rows.dropped.items())
    parts: list[RenderableType] = [
        Text(f"{found.model} against {found.base}", style="bold"),
        Text(f"{rows.source}: {plural(rows.rows_in, 'row')}, {plural(rows.kept, found.examples.noun)}{dropped}\n"),
        _preferences(found),
    ]
    if found.answers:
        parts += [Text(), _answers(found.answers)]
    return Group(*parts)


def _preferences(found: EvaluationReport) -> Table:
    table = Table(
        title=f"Preferences on {plural(found.pairs, found.examples.noun)}, with 95% intervals", title_justify="left"
    )
    table.add_column("")
    table.add_column("", justify="right")
    for title, metric in _SHOWN:
        table.add_row(title, found.with_interval(metric))
    shares: tuple[tuple[str, Share | None], ...] = (
        ("KL from the base (nats per token)", found.examples.kl),
        ("Baseline: “The longer answer is better”", found.examples.longer_wins),
        ("Accuracy where the chosen answer is longer", found.examples.accuracy_longer_chosen),
        ("Accuracy where the chosen answer is shorter", found.examples.accuracy_shorter_chosen),
    )
    for title, share in shares:
        if share and share.value is not None:
            low, high = share.interval
            table.add_row(
                title, f"{share.value:.3f} [{low:.3f}, {high:.3f}], {plural(share.pairs, found.examples.noun)}"
            )
    return table


def _answers(answers: JudgedAnswers) -> RenderableType:
    table = Table(title=f"Answers to {plural(answers.prompts, 'prompt')}", title_justify="left")
    for heading in ("", "base", "tuned"):
        table.add_column(heading, justify="right" if heading else "left")
    for title, name, form in _COUNTED:
        table.add_row(title, form.format(getattr(answers.base, name)), form.format(getattr(answers.tuned, name)))
    won = answers.win_rate
    low, high = won.interval
    low_same, high_same = won.length_controlled_interval
    if answers.judge == RuleJudge.name:
        said = (
            f"faults of form (empty, cut off, repeating, another language): fewer than the base on {won.wins} "
            f"prompts, as many on {won.ties}, more on {won.losses}; this is a count, not a judgement: "
            "short answers are cut off less often"
        )
        return Group(table, Text(said, style="cyan"))
    said = (
        f"win rate {won.rate:.2f} [{low:.2f}, {high:.2f}] ({won.wins} won, {won.ties} tied, {won.losses} lost); "
        f"at equal lengths {won.length_controlled:.2f} [{low_same:.2f}, {high_same:.2f}]. Judge: {answers.judge}"
    )
    return Group(table, Text(said, style="cyan"))
