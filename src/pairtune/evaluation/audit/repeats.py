"""Rules about rows that repeat, do not move, or stand in an impossible order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

from pairtune.errors import plural
from pairtune.evaluation.audit.evidence import ANSWERS, Evidence, Row, TrialLog
from pairtune.evaluation.audit.rule import Hit, Rule

# What says where a row stands, and what measures the machine: none of it tells whether two rows are the same.
_PLACE = ("step", "epoch", "learning_rate", "num_tokens", "train_loss", "total_flos")
_OF_THE_MACHINE = ("runtime", "per_second")
# Two rows with this many equal numbers that are no round values are one row.
_EQUAL_NUMBERS = 3
_DECIMALS = 4  # tables print so many, with which honest rows can agree
# Rows from which a column that never changes is taken for frozen.
_FROZEN_ROWS = 5
_CHANGED = 0.01  # of the margin
_COARSE = 1e-5
# Evaluations needed to see where they go, and by which factor the first and the last have to differ.
_EVALUATIONS, _FURTHER = 4, 1.5


def _out_of_order(evidence: Evidence) -> Iterator[Hit]:
    for trial in evidence.trials:
        for what, rows in (("step", trial.steps), ("evaluation", trial.evaluations)):
            back = [
                f"{name} {row[name]:g} after {before[name]:g}"
                for before, row in pairwise(rows)
                for name in ("step", "epoch")
                if name in row and name in before and row[name] < before[name]
            ]
            if back:
                yield Hit("error", (trial.name,), f"in {len(back)} places {what}s go back: {', '.join(back[:3])}")
                break


def _fingerprint(row: Row) -> tuple[tuple[str, float], ...]:
    """A row's measured numbers; empty where there are too few, or too coarse ones, to tell it from others."""
    numbers = {
        name: value
        for name, value in row.items()
        if name not in _PLACE and not name.endswith(_OF_THE_MACHINE) and math.isfinite(value)
    }
    telling = [value for value in numbers.values() if round(value, _DECIMALS) != value]
    return tuple(sorted(numbers.items())) if len(telling) >= _EQUAL_NUMBERS else ()


def _repeated(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Rows with all numbers of an earlier row, each with that row."""
    first: dict[tuple[tuple[str, float], ...], Row] = {}
    found = []
    for row in rows:
        key = _fingerprint(row)
        if key and key in first:
            if row.get("step") != first[key].get("step", math.nan):  # a second evaluation of the same weights
                found.append((first[key], row))
        elif key:
            first[key] = row
    return found


def _rows_repeat(evidence: Evidence) -> Iterator[Hit]:
    for trial in evidence.trials:
        if not _moves(trial):
            if found := _stands_still(trial):
                yield Hit("warning", (trial.name,), found)
            continue
        for what, rows in (("evaluation", trial.evaluations), ("step", trial.steps)):
            twice = _repeated(rows)
            if not twice:
                continue
            shown = ", ".join(f"{_where(copy)} is that of {_where(source)}" for source, copy in twice[:3])
            yield Hit(
                "error",
                (trial.name,),
                f"{plural(len(twice), what)} of {len(rows)} with every number of an earlier one: {shown}",
            )


def _stands_still(trial: TrialLog) -> str:
    """Equal evaluations of a model away from its base: it does not move, or was not evaluated again."""
    rows = trial.evaluations
    away = any(abs(row.get(f"rewards/{answer}", 0.0)) > 0 for row in rows for answer in ANSWERS)
    if len(rows) > 1 and away and len({_fingerprint(row) for row in rows}) == 1 and _fingerprint(rows[0]):
        return f"all {len(rows)} evaluations have the same numbers: the model did not move, or was not evaluated again"
    return ""


def _where(row: Row) -> str:
    return next((f"{name} {row[name]:g}" for name in ("step", "epoch") if name in row), "a row")


def _moves(trial: TrialLog) -> bool:
    """Whether anything says that the model changed: an optimizer that did something, or numbers that differ."""
    if any(row.get("grad_norm", 0.0) > 0 and row.get("learning_rate", 1.0) > 0 for row in trial.steps):
        # With gradients and a rate, only a model that is not the one that is trained stays as it is.
        return len({_fingerprint(row) for row in trial.steps if row.get("learning_rate", 1.0) > 0}) > 1
    return len({_fingerprint(row) for row in trial.evaluations}) > 1


def _trials_repeat(evidence: Evidence) -> Iterator[Hit]:
    for one, other in combinations(evidence.trials, 2):
        for what, rows, theirs in (
            ("evaluations", one.evaluations, other.evaluations),
            ("steps", one.steps, other.steps),
        ):
            known = {key for row in rows if (key := _fingerprint(row))}
            same = sum(_fingerprint(row) in known for row in theirs)
            if same and 2 * same >= min(len(rows), len(theirs)):
                # One run that was continued, or its copy from before that, agrees up to where the shorter one ends.
                prefix = len(rows) != len(theirs) and same == min(len(rows), len(theirs))
                yield Hit(
                    "note" if prefix else "error",
                    (one.name, other.name),
                    f"{same} of {len(theirs)} {what} of {other.name} have every number of {one.name}"
                    + (", which is shorter or longer: one may be the other's beginning" if prefix else ""),
                )
                break


def _frozen(evidence: Evidence) -> Iterator[Hit]:
    for trial in evidence.trials:
        if not _moves(trial):
            continue
        for name, what, rows in (
            ("loss", "steps", trial.steps),
            ("grad_norm", "steps", trial.steps),
            ("loss", "evaluations", trial.evaluations),
        ):
            known = [row for row in rows if name in row and "rewards/margins" in row]
            values, margins = {row[name] for row in known}, [row["rewards/margins"] for row in known]
            if len(known) < _FROZEN_ROWS or len(values) > 1 or max(margins) - min(margins) < _CHANGED:
                continue
            (value,) = values
            if (
                value and math.isfinite(value) and trial.off(name) < _COARSE
            ):  # other rules look at zeros, and coarse numbers can be equal
                yield Hit(
                    "error", (trial.name,), f"{name} is {value:g} in all {len(known)} {what}, while the margins change"
                )


def _evaluations_reversed(evidence: Evidence) -> Iterator[Hit]:
    """Evaluations that come back to the base while the training rows between them go away from it."""
    for trial in evidence.trials:
        ways = _ways(trial)
        if len(ways) < _EVALUATIONS:
            continue
        trained, evaluated = zip(*ways, strict=True)
        away, back = _ordered(trained), _ordered(evaluated[::-1])
        if evaluated[-1] <= 3 * trial.off("rewards/chosen", "rewards/rejected"):
            continue
        if away and back and trained[-1] >= _FURTHER * trained[0] and evaluated[0] >= _FURTHER * evaluated[-1]:
            shown = " to ".join(f"{way:.3f}" for way in (evaluated[0], evaluated[-1]))
            yield Hit(
                "error",
                (trial.name,),
                f"over the evaluations, mean rewards come back towards 0 ({shown}), while those of the training rows "
                f"between them go from {trained[0]:.3f} to {trained[-1]:.3f}",
            )


def _ways(trial: TrialLog) -> list[tuple[float, float]]:
    """For each evaluation: the length of the rewards of the training rows since the one before, and its own."""
    found, start = [], 0.0
    for row in trial.evaluations:
        since = [_way(step) for step in trial.steps if start < step.get("step", math.nan) <= row.get("step", math.nan)]
        if since and row.get("step", 0) > 0 and not trial.reference_free:
            found.append((sum(since) / len(since), _way(row)))
        start = row.get("step", math.nan)
    return [pair for pair in found if all(map(math.isfinite, pair))]


def _way(row: Row) -> float:
    return math.hypot(*(row.get(f"rewards/{answer}", math.nan) for answer in ANSWERS))


def _ordered(values: Sequence[float]) -> bool:
    return all(before <= after for before, after in pairwise(values))


def _no_ways(trial: TrialLog, evidence: Evidence) -> str:
    return "" if len(_ways(trial)) >= _EVALUATIONS else f"{_EVALUATIONS} evaluations with training rows between them"


def _no_order(trial: TrialLog, evidence: Evidence) -> str:
    rows: Sequence[Row] = [*trial.steps, *trial.evaluations]
    return "" if len(rows) > 1 and any("step" in row or "epoch" in row for row in rows) else "rows with steps or epochs"


def _no_rows(trial: TrialLog, evidence: Evidence) -> str:
    rows = max(len(trial.steps), len(trial.evaluations))
    known = rows > 1 and any(map(_fingerprint, [*trial.steps, *trial.evaluations]))
    return "" if known else "two rows with several metrics"


def _no_two(evidence: Evidence) -> str:
    known = sum(any(map(_fingerprint, [*trial.steps, *trial.evaluations])) for trial in evidence.trials)
    return "" if known > 1 else "two trials with several metrics"


def _no_steps(trial: TrialLog, evidence: Evidence) -> str:
    known = sum("loss" in row and "rewards/margins" in row for row in trial.steps)
    return "" if known >= _FROZEN_ROWS else f"losses and margins of {_FROZEN_ROWS} steps"


RULES = (
    Rule(
        "rows-order",
        "Rows are out of order",
        "A log is written while training goes on, so steps and epochs never go back.",
        "Use the log as the trainer wrote it; a sorted or merged one may join what belongs to different runs.",
        _out_of_order,
        lacks=_no_order,
    ),
    Rule(
        "evaluations-order",
        "Evaluations go the other way than the training",
        "Evaluations follow the training: as it goes away from the base, so do they.",
        "Check that each evaluation stands beside the step that it was made at.",
        _evaluations_reversed,
        lacks=_no_ways,
    ),
    Rule(
        "rows-repeat",
        "Rows repeat each other",
        "While a model is trained, no two measurements agree in every digit. Rows that do were copied, or the second "
        "measurement was never made.",
        "Evaluate again, on the weights of that step.",
        _rows_repeat,
        lacks=_no_rows,
    ),
    Rule(
        "trials-repeat",
        "Two trials have the same numbers",
        "Other settings or another seed give other numbers. Two equal logs are one run, counted twice: the seed was "
        "ignored, or a file was copied.",
        "Run the second trial, or leave it out; an average over such trials says nothing about chance.",
        _trials_repeat,
        _no_two,
    ),
    Rule(
        "frozen-column",
        "A column never changes",
        "Loss and gradient norm depend on the batch, so they change from step to step.",
        "Log the value of the step, not a constant or the value after clipping.",
        _frozen,
        lacks=_no_steps,
    ),
)
