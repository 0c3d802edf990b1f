"""Evidence from tables: one row per evaluation with TRL's column names, and W&B's exports."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pairtune.errors import BadInput, one_line
from pairtune.evaluate.audit.evidence import Evidence, TrialLog
from pairtune.evaluate.audit.logged_rows import add_rows, describe, trl_name

# Column titles of printed tables, and TRL's names for them.
_TITLES = {
    "training loss": "loss",
    "validation loss": "eval_loss",
    "lr": "learning_rate",
    "trial": "run",
    "name": "run",
}
_NO_VALUE = ("", "no log", "none", "-", "nan")
_PERCENT = 2  # accuracies above this are percentages; between 1 and this they are wrong


def evidence_of_csv(path: Path) -> Evidence:
    """Read a table with one row per evaluation; trials are told apart by `run`, or else by learning rate and beta.

    W&B's exports are such tables too: of a run's history, of a list of runs, and of a chart, which has a column for
    each run and metric.

    Raises:
        BadInput: it cannot be read, a cell is not a number, or it has no column of evaluation metrics.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path}: cannot be read as CSV ({one_line(error)})") from error
    if not rows:
        raise BadInput(f"{path}: has no rows")
    rows = _of_chart(rows)
    titles = {_name(title) for title in rows[0] if title}
    if not titles & {"eval_loss", "loss", "rewards/chosen", "eval_rewards/chosen"}:
        raise BadInput(f"{path}: has neither eval_loss nor rewards/chosen among its columns ({', '.join(rows[0])})")
    # In a log of steps the learning rate follows its schedule, so it does not identify trials.
    of_steps = "grad_norm" in titles or any(re.match("train/", title or "") for title in rows[0])
    told_by = ("run", "beta") if of_steps else ("run", "learning_rate", "beta")
    trials: dict[tuple[str, ...], TrialLog] = {}
    logged: dict[tuple[str, ...], list[dict[str, float]]] = {}
    for number, cells in enumerate(rows, 2):
        named = _named(cells, f"{path}, row {number}")
        numbers = {name: value for name, value in named.items() if name not in told_by}
        if not any(name in numbers or f"eval_{name}" in numbers for name in ("loss", "rewards/chosen")):
            continue  # such as the summary at the end of training
        key = tuple(str(named.get(name, "")) for name in told_by)
        if key not in trials:
            rate = named.get("learning_rate") if "learning_rate" in told_by else None
            trials[key] = TrialLog(_trial_name(named, len(trials) + 1), rate, named.get("beta"))
        logged.setdefault(key, []).append(_as_evaluation(numbers))
    for key, log in trials.items():
        add_rows(log, logged[key])
        describe(log, {"beta": log.beta})
    return Evidence(path, "CSV", list(trials.values()))


def _of_chart(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of an exported chart, `NAME - eval/loss` with its __MIN and __MAX, one for each run and step."""
    titles = [title for title in rows[0] if title and re.search(r" - (train|eval)/", title)]
    if not titles:
        return rows
    melted: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        step = next((row[title] for title in row if title and _name(title) == "step"), "")
        for title in titles:
            name, _, metric = title.partition(" - ")
            if row[title] and not metric.endswith(("__MIN", "__MAX")):
                melted.setdefault((name, step), {"run": name, "step": step})[metric] = row[title]
    whole = dict.fromkeys(name for row in melted.values() for name in row)
    return [{name: row.get(name, "") for name in whole} for row in melted.values()] or rows


def _name(title: str) -> str:
    """TRL's name for a column with this title."""
    lower = title.strip().lower()
    return _TITLES.get(lower, trl_name(lower))


def _named(cells: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """A row under TRL's names: `run` as text, everything else as numbers; empty cells are left out."""
    named: dict[str, Any] = {}
    for title, cell in cells.items():
        if title is None or cell is None:
            raise BadInput(f"{where}: has more or fewer cells than the header")
        text, name = cell.strip(), _name(title)
        if name == "run":
            named[name] = text
        elif text.lower() not in _NO_VALUE:
            try:
                named[name] = float(text)
            except ValueError:
                if "/" in name or name in ("loss", "eval_loss", "beta", "learning_rate", "epoch", "step"):
                    raise BadInput(f"{where}, {title}: {text!r} is not a number") from None
            if name.endswith("rewards/accuracies") and named.get(name, 0) > _PERCENT:
                raise BadInput(f"{where}, {title}: {text} is not between 0 and 1 (divide percentages by 100)")
    return named


def _trial_name(named: Mapping[str, Any], number: int) -> str:
    label = named.get("run") or str(number)
    return f"run {label}" if label.isdigit() else label


def _as_evaluation(numbers: Mapping[str, float]) -> dict[str, float]:
    """In a row with an evaluation loss, count metrics without `eval_` as the evaluation's too."""
    if "eval_loss" not in numbers and not any(name.startswith("eval_") for name in numbers):
        return dict(numbers)
    prefixed = any(name.startswith("eval_") and "/" in name for name in numbers)
    own = {} if prefixed else {f"eval_{name}": value for name, value in numbers.items() if "/" in name}
    return {**{name: value for name, value in numbers.items() if f"eval_{name}" not in own}, **own}
