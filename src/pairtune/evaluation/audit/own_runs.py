"""Evidence from one of Pairtune's own run folders, finished or not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from pairtune.errors import BadInput
from pairtune.evaluation.audit.evidence import RUN_FOLDER, Evidence, Row, TrialLog
from pairtune.files import saved_fingerprint
from pairtune.run.examples import Examples, PairIndex
from pairtune.run.folder import Run, Trial
from pairtune.run.metrics import Evaluation, TrainingStep
from pairtune.run.records import DataRecord, Selection

_EVALUATION = "eval_"


def evidence_of_run(root: Path) -> Evidence:
    """Read what a run has written so far.

    Raises:
        BadInput: there is no run in this folder, or one of its files is damaged.
    """
    run = Run.started(root)
    if damage := run.damage:
        raise BadInput(f"{root}/{damage[0]}")
    data, selection = run.need(DataRecord), run.selection
    logs = []
    for trial in run.trials:
        log = _log(trial)
        if run.lineage and run.lineage.reference == "base":
            log.elsewhere = f"it started from {run.lineage.start.name} and is measured against the base under it"
        log.eval_rows = data.splits["validation"].pairs
        log.saved = _other_weights(run, trial, selection)
        logs.append(log)
    return Evidence(
        source=root,
        kind=RUN_FOLDER,
        trials=logs,
        selection=selection,
        data=data,
        generations=run.generations,
        prompts=PairIndex.read(run.paths.pairs).prompts() if run.paths.pairs.is_file() else {},
    )


def split_metrics(row: Mapping[str, object]) -> tuple[bool, dict[str, float]]:
    """Whether a logged row is an evaluation, and its numbers, without the `eval_` prefix.

    An evaluation's own training loss is called `train_loss`.
    """
    numbers = {name: number for name, value in row.items() if (number := as_number(value)) is not None}
    if not any(name.startswith(_EVALUATION) for name in numbers):
        return False, numbers
    evaluation = {name.removeprefix(_EVALUATION): value for name, value in numbers.items() if name != "loss"}
    if "loss" in numbers:
        evaluation["train_loss"] = numbers["loss"]
    return True, evaluation


def as_number(value: object) -> float | None:
    """A logged value as a number, also where JSON has it as text; None if it is none."""
    if not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None
    except OverflowError:
        return math.inf


def _log(trial: Trial) -> TrialLog:
    config, record = trial.config, trial.record
    log = TrialLog(
        trial.name,
        status=record.status if record else "running",
        reason=record.reason if record else "",
        best_epoch=trial.best_epoch,
    )
    if config:
        log.learning_rate, log.beta, log.loss = config.learning_rate, config.beta, config.loss
        log.max_grad_norm = config.max_grad_norm
        log.loss_settings = {
            "label_smoothing": config.label_smoothing,
            "sft_weight": config.sft_weight,
            "simpo_gamma": config.simpo_gamma,
            "discopop_tau": config.discopop_tau,
        }
    add_lines(log, trial.log.steps)
    add_lines(log, trial.log.evaluations)
    file = trial.paths.examples(trial.best_epoch or 0)
    if file.is_file():
        log.examples = Examples.read(file).columns()
    return log


def add_lines(log: TrialLog, lines: Iterable[TrainingStep | Evaluation]) -> None:
    """Add the lines that a Pairtune trial has logged."""
    for line in lines:
        add_row(log, line.metrics())


def add_row(log: TrialLog, row: Mapping[str, object]) -> None:
    """Add one logged row to the steps or to the evaluations."""
    evaluation, numbers = split_metrics(row)
    rows: list[Row] = log.evaluations if evaluation else log.steps
    rows.append(numbers)


def _other_weights(run: Run, trial: Trial, selection: Selection | None) -> str:
    """How saved weights, hashed again, differ from the evaluated ones; empty where they do not."""
    if trial.record is None:
        return ""
    folders = [trial.paths.best] if trial.record.status == "finished" else []
    if selection and selection.winner == trial.name:
        folders.append(run.paths.best)
    said = ""
    for folder in folders:
        found = saved_fingerprint(folder) if folder.is_dir() else "none"
        if found != trial.record.best_fingerprint:
            place, expected = folder.relative_to(run.root), trial.record.best_fingerprint
            said = f"{place} holds weights {found}, but epoch {trial.best_epoch} wrote {expected}"
    return said
