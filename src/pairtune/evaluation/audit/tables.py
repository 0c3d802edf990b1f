"""Evidence from tables: one row per evaluation with TRL's column names, and W&B's exports."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pairtune.errors import BadInput, one_line
from pairtune.evaluation.audit.evidence import Evidence, TrialLog
from pairtune.evaluation.audit.logged_rows import add_rows, describe, trl_name

# Column titles of printed tables, and TRL's names for them.
_TITLES = {
    "training loss": "loss",
    "validation loss": "eval_loss",
    "lr": "learning_rate",
    "trial": "run",
    "name": "run",
}
_NO_VALUE = ("", "no log", "none", "-")
# Columns with this many decimals are taken to be exact.
_EXACT = 12
_PERCENT = 2  # accuracies above this are percentages; between 1 and this they are wrong


def evidence_of_csv(path: Path) -> Evidence:
    """Read a table with one row per evaluation; trials are told apart by `run`, or else by learning rate and beta.

    W&B's exports are such tables too: of a run's history, of a list of runs, and of a chart, which has a column for
    each run and metric.

    Raises:
        BadInput: it cannot be read, a cell is not a number, or it has no column of evaluation metrics.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        header = text.partition("\n")[0]
        european = header.count(";") > header.count(",")
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=";" if european else ","))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path}: cannot be read as CSV ({one_line(error)})") from error
    if not rows:
        raise BadInput(f"{path}: has no rows")
    rows = _of_chart(rows)
    titles = {_name(title) for title in rows[0] if title}
    if not titles & {"eval_loss", "loss", "rewards/chosen", "eval_rewards/chosen"}:
        names = ", ".join(str(title) for title in rows[0])
        raise BadInput(f"{path}: has neither eval_loss nor rewards/chosen among its columns ({names})")
    # In a log of steps the learning rate follows its schedule, so it does not identify trials.
    of_steps = "grad_norm" in titles or any(re.match("train/", title or "") for title in rows[0])
    rates = [row[title] for row in rows for title in row if title and _name(title) == "learning_rate"]
    # A rate that is another one in every row follows its schedule, and does not tell trials apart.
    scheduled = "step" in titles and "run" not in titles and len(set(rates)) == len(rows) > 2
    told_by = ("run", "beta") if of_steps or scheduled else ("run", "learning_rate", "beta")
    trials: dict[tuple[str, ...], TrialLog] = {}
    logged: dict[tuple[str, ...], list[dict[str, float]]] = {}
    kinds: dict[tuple[str, ...], str] = {}
    rounding = _roundings(rows)
    for number, cells in enumerate(rows, 2):
        named = _named(_dotted(cells) if european else cells, f"{path}, row {number}")
        numbers = {name: value for name, value in named.items() if name not in told_by}
        if not any(name in numbers or f"eval_{name}" in numbers for name in ("loss", "rewards/chosen")):
            continue  # such as the summary at the end of training
        key = tuple(str(named.get(name, "")) for name in told_by)
        if not {"step", "epoch"} & named.keys():
            key = (*key, str(number))  # a list of runs has a row for each
        if key not in trials:
            rate = named.get("learning_rate") if "learning_rate" in told_by else None
            trials[key] = TrialLog(_trial_name(named, len(trials) + 1), rate, named.get("beta"))
        kinds[key] = next((str(cells[title]) for title in cells if title and _name(title) == "loss_type"), "")
        logged.setdefault(key, []).append(_as_evaluation(numbers))
    for key, log in trials.items():
        add_rows(log, logged[key])
        describe(log, {"beta": log.beta, "loss_type": kinds.get(key)})
        log.rounding = rounding
    return Evidence(path, "CSV", list(trials.values()))


def _dotted(cells: Mapping[Any, Any]) -> dict[Any, Any]:
    """A row with decimal points for decimal commas."""
    return {title: cell.replace(",", ".") if isinstance(cell, str) else cell for title, cell in cells.items()}


def _roundings(rows: Sequence[Mapping[Any, Any]]) -> dict[str, float]:
    """Half a unit of the last decimal that a column's cells are printed with, for columns with few decimals."""
    found = {}
    for title in filter(None, rows[0]):
        cells = [str(row.get(title) or "").strip() for row in rows]
        if any("e" in cell.lower() for cell in cells):
            continue
        decimals = max((len(re.split(r"[.,]", cell)[-1]) for cell in cells if re.search(r"[.,]", cell)), default=0)
        if 0 < decimals < _EXACT:
            found[_name(title).removeprefix("eval_")] = 0.5 * 10.0**-decimals
    return found


def _of_chart(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of an exported chart, `NAME - eval/loss` with its __MIN and __MAX, one for each run and step."""
    titles = [title for title in rows[0] if title and re.search(r" - (train|eval)/", title)]
    if not titles:
        return rows
    melted: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        step = next((row[title] for title in row if title and _name(title) == "step"), "")
        for title in titles:
            name, metric = re.split(r" - (?=(?:train|eval)/)", title, maxsplit=1)
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
