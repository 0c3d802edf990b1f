"""What `pairtune eval` found, for the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_SHOWN = (
    ("Loss", "eval_loss"),
    ("Accuracy", "eval_rewards/accuracies"),
    ("Margin", "eval_rewards/margins"),
    ("Margin per token (nats)", "eval_logps/margins_per_token"),
)
_COUNTED = (
    ("median tokens", "median_tokens", "{:.0f}"),
    ("ended by themselves", "ended_share", "{:.0%}"),
    ("empty", "empty_share", "{:.0%}"),
    ("repeated phrases", "repeated_share", "{:.0%}"),
    ("refused", "refused_share", "{:.0%}"),
    ("another language", "other_language_share", "{:.0%}"),
)


def render_evaluation(record: dict[str, Any]) -> RenderableType:
    """Preferences with their intervals, and answers with who wins."""
    rows = record["data"]
    dropped = "".join(f", {count} dropped: {reason}" for reason, count in rows["dropped"].items())
    parts: list[RenderableType] = [
        Text(f"{record['model']} against {record['base']}", style="bold"),
        Text(f"{rows['source']}: {rows['rows_in']} rows, {rows['kept']} pairs{dropped}\n"),
        _preferences(record),
    ]
    if "answers" in record:
        parts += [Text(), _answers(record["answers"])]
    return Group(*parts)


def _preferences(record: dict[str, Any]) -> Table:
    table = Table(title=f"Preferences on {record['pairs']} pairs, with 95 % intervals", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    for title, metric in _SHOWN:
        low, high = record["intervals"][metric]
        table.add_row(title, f"{record['metrics'][metric]:.3f} [{low:.3f}, {high:.3f}]")
    examples = record["examples"]
    for title, name in (
        ("KL from the base (nats per token)", "kl"),
        ("“The longer answer is better” is right", "longer_wins"),
        ("Accuracy where the longer answer is better", "accuracy_longer_chosen"),
        ("Accuracy where the shorter answer is better", "accuracy_shorter_chosen"),
    ):
        found = examples.get(name)
        if found and found["value"] is not None:
            low, high = found["interval"]
            table.add_row(title, f"{found['value']:.3f} [{low:.3f}, {high:.3f}], {found['pairs']} pairs")
    return table


def _answers(answers: dict[str, Any]) -> RenderableType:
    table = Table(title=f"Answers to {answers['prompts']} prompts", title_justify="left")
    for heading in ("", "base", "tuned"):
        table.add_column(heading, justify="right" if heading else "left")
    for title, name, form in _COUNTED:
        table.add_row(title, form.format(answers["base"][name]), form.format(answers["tuned"][name]))
    won = answers["win_rate"]
    low, high = won["interval"]
    low_same, high_same = won["length_controlled_interval"]
    said = (
        f"win rate {won['rate']:.2f} [{low:.2f}, {high:.2f}]: {won['wins']} wins, {won['ties']} ties, {won['losses']} "
        f"losses; at equal lengths {won['length_controlled']:.2f} [{low_same:.2f}, {high_same:.2f}]. "
        f"Judge: {answers['judge']}"
    )
    return Group(table, Text(said, style="cyan"))
