"""What logs of other tools have in common: TRL's column names, the number of validation rows, settings beside a log."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from pairtune.config import Loss
from pairtune.errors import BadInput, plural
from pairtune.evaluation.audit.evidence import KTO, Evidence, TrialLog
from pairtune.evaluation.audit.own_runs import add_row, as_number

# Rounding of what transformers logs: speeds to three decimals, times to four.
_SPEED, _TIME = 5e-4, 5e-5
_HUGE = 1e12  # no setting is as large


# Losses by TRL's and this project's names.
LOSSES = (*get_args(Loss), "bco_pair", "aot", "aot_pair", "aot_unpaired", "sft", "cpo")


def trl_name(name: str) -> str:
    """TRL's name for a column: transformers logs `train/loss` and `eval/loss` to trackers."""
    if name.startswith("eval/"):
        return "eval_" + name.removeprefix("eval/")
    if name in ("train/global_step", "_step"):
        return "step"
    return name.removeprefix("train/")


def trl_names(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row under TRL's names, without a tracker's own columns; of several steps the trainer's own counts."""
    named: dict[str, Any] = {}
    for name in sorted(row, key=lambda name: name == "_step"):
        if trl_name(name) not in named and not trl_name(name).startswith("_"):
            named[trl_name(name)] = row[name]
    return named


def add_rows(log: TrialLog, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add logged rows under TRL's names; those without a loss or rewards, such as a summary, are none."""
    for row in map(_without_gaps, rows):
        if any(start + name in row for start in ("", "eval_") for name in ("loss", "rewards/chosen")):
            add_row(log, row)
    log.batch_means = True
    if any("kl" in row for row in (*log.steps, *log.evaluations)):
        log.loss = log.loss or KTO
    log.eval_rows, log.eval_batches = _per_evaluation(log, "samples"), _per_evaluation(log, "steps")
    rates = [row["learning_rate"] for row in log.steps if row.get("learning_rate", 0) > 0]
    if log.learning_rate is None and rates:
        log.learning_rate = max(rates)


def _without_gaps(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's numbers, without the nulls and NaNs of tables that have every column in every row.

    A null loss or norm, or a NaN, is one only beside another metric of its kind, training or evaluation.
    """
    numbers = {name: math.nan if value is None else as_number(value) for name, value in row.items()}
    measured = {
        name.startswith("eval_")
        for name, value in numbers.items()
        if value is not None and math.isfinite(value) and _is_metric(name)
    }

    def is_gap(name: str, value: float) -> bool:
        named = row[name] is not None or (_is_metric(name) and "/" not in name)
        return math.isnan(value) and not (named and name.startswith("eval_") in measured)

    return {name: value for name, value in numbers.items() if value is not None and not is_gap(name, value)}


def _is_metric(name: str) -> bool:
    return "/" in name or name.removeprefix("eval_") in ("loss", "grad_norm")


def _per_evaluation(log: TrialLog, what: str) -> int | None:
    """The number of rows or batches of an evaluation: its time, times how many of them it made per second."""
    found = set()
    for row in log.evaluations:
        seconds, speed = row.get("runtime", math.nan), row.get(f"{what}_per_second", math.nan)
        if not (math.isfinite(seconds) and math.isfinite(speed)) or min(seconds, speed) <= 0:
            continue
        if not math.isfinite(seconds * speed):
            continue
        count = round(seconds * speed)
        room = _SPEED * seconds + _TIME * speed
        if room < 0.5 and abs(seconds * speed - count) <= room:
            found.add(count)
    return found.pop() if len(found) == 1 else None


def describe(log: TrialLog, settings: Mapping[str, Any]) -> None:
    """Take a trial's settings from what was written beside its log, under the names of TRL's arguments."""
    beta = number_of(settings.get("beta"))
    log.beta = beta if beta and beta > 0 else log.beta
    log.learning_rate = number_of(settings.get("learning_rate")) or log.learning_rate
    norm = number_of(settings.get("max_grad_norm"))
    if norm is not None:
        log.max_grad_norm = norm if norm > 0 else math.inf
    kinds = settings.get("loss_type", settings.get("loss"))
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if kinds and all(kind in LOSSES for kind in kinds):
        log.loss = kinds[0] if len(kinds) == 1 else "several"
    if smoothing := number_of(settings.get("label_smoothing")):
        log.loss_settings = {"label_smoothing": smoothing}
    if settings.get("f_divergence_type", "reverse_kl") not in ("reverse_kl", None) or settings.get("use_weighting"):
        log.loss = f"{log.loss} (changed)"


def number_of(value: Any) -> float | None:
    """A finite number of an ordinary size; None for anything else."""
    usual = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _HUGE
    return float(value) if usual else None


def with_options(
    evidence: Evidence,
    eval_rows: int | None = None,
    batch_size: int | None = None,
    betas: Sequence[str | float] | None = None,
    loss: str | None = None,
) -> Evidence:
    """Add what a log does not record.

    Args:
        evidence: what the log records.
        eval_rows: number of validation rows.
        batch_size: of evaluations.
        betas: one for all trials, one for each in their order, or `NAME=BETA`.
        loss: TRL's name of the loss.

    Raises:
        BadInput: the log shows another number of rows; there is no such loss; a beta is no number above 0, or its trial
            does not exist; or the number of betas is neither 1 nor that of the trials.
    """
    if loss is not None and loss not in LOSSES:
        raise BadInput(f"--loss {loss}: should be one of {', '.join(LOSSES)}")
    given = _betas(evidence, betas or [])
    for trial in evidence.trials:
        if eval_rows and trial.eval_rows and eval_rows != trial.eval_rows:
            raise BadInput(f"--eval-rows {eval_rows}: the log of {trial.name} shows {trial.eval_rows}")
        trial.eval_rows = eval_rows or trial.eval_rows
        trial.batch_size = batch_size or trial.batch_size
        trial.beta = given.get(trial.name, trial.beta)
        trial.loss = loss or trial.loss
    return evidence


def _betas(evidence: Evidence, given: Sequence[str | float]) -> dict[str, float]:
    """The given betas by trial."""
    names = [trial.name for trial in evidence.trials]
    listed, betas = [], {}
    for text in map(str, given):
        name, equals, value = text.rpartition("=")
        try:
            beta = float(value)
        except ValueError:
            beta = math.nan
        if not 0 < beta < math.inf:
            raise BadInput(f"--beta {text}: should be a number above 0, or TRIAL=NUMBER")
        if not equals:
            listed.append(beta)
        elif name in names:
            betas[name] = beta
        else:
            raise BadInput(f"--beta {text}: there is no trial {name}; the trials are {', '.join(names)}")
    if listed and len(listed) not in (1, len(names)):
        raise BadInput(
            f"--beta: {len(listed)} given for {plural(len(names), 'trial')}; give one, or one for each trial in the "
            f"order {', '.join(names)}, or TRIAL=NUMBER"
        )
    return {name: listed[at % len(listed)] for at, name in enumerate(names)} | betas if listed else betas
