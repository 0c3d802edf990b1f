"""Evidence from a run folder of this project, finished or not."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pairtune.config import resolve
from pairtune.evaluate.audit.evidence import RUN_FOLDER, Evidence, Row, TrialLog
from pairtune.runs import RunFolder, saved_fingerprint

_EVALUATION = "eval_"
_LOSS_SETTINGS = ("label_smoothing", "sft_weight", "simpo_gamma", "discopop_tau")


def evidence_of_run(root: Path) -> Evidence:
    """Read what a run has written so far.

    Raises:
        BadInput: there is no run in this folder, or a file of it is damaged.
    """
    run = RunFolder.started(root)
    data, selection = run.read_json(run.data), _json(run, run.selection)
    logs = []
    settings = _settings(run)
    for record in _records(run):
        log = _log(run, record, settings)
        log.eval_rows = data["splits"]["validation"]["pairs"]
        logs.append(log)
    _compare_weights(run, logs, selection)
    return Evidence(
        source=root,
        kind=RUN_FOLDER,
        trials=logs,
        selection=selection,
        data=data,
        generations=_json(run, run.generations),
        prompts=_prompts(run),
    )


def split_metrics(row: Mapping[str, Any]) -> tuple[bool, dict[str, float]]:
    """Whether a logged row is an evaluation, and its numbers; those of an evaluation without `eval_`.

    An evaluation's own training loss is called `train_loss`.
    """
    numbers = {name: float(value) for name, value in row.items() if isinstance(value, int | float)}
    if not any(name.startswith(_EVALUATION) for name in numbers):
        return False, numbers
    evaluation = {name.removeprefix(_EVALUATION): value for name, value in numbers.items() if name != "loss"}
    if "loss" in numbers:
        evaluation["train_loss"] = numbers["loss"]
    return True, evaluation


def _records(run: RunFolder) -> list[dict[str, Any]]:
    """Every trial's record: of those that have ended their `trial.json`, of the others what their folder tells."""
    if not run.trials.is_dir():
        return []
    order = {entry["name"]: place for place, entry in enumerate(_json(run, run.sweep).get("trials", []))}
    folders = sorted(run.trials.iterdir(), key=lambda folder: (order.get(folder.name, len(order)), folder.name))
    records = []
    for folder in folders:
        ended = run.trial(folder.name).record.is_file()
        records.append(run.read_json(run.trial(folder.name).record) if ended else {"name": folder.name})
    return records


def _settings(run: RunFolder) -> dict[str, dict[str, Any]]:
    """The settings of the grid's trials by name: of trials that have not ended they are on record nowhere else."""
    return {trial.name: trial.model_dump() for trial in resolve(run.config, {}).config.trials()}


def _log(run: RunFolder, record: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]]) -> TrialLog:
    folder, config = run.trial(record["name"]), record.get("config") or settings.get(record["name"], {})
    log = TrialLog(
        record["name"],
        config.get("learning_rate"),
        config.get("beta"),
        config.get("loss", "sigmoid"),
        {name: config[name] for name in _LOSS_SETTINGS if config.get(name) is not None},
        max_grad_norm=config.get("max_grad_norm", 1.0),
        status=record.get("status", "running"),
        reason=record.get("reason", ""),
        best_epoch=record.get("best_epoch"),
    )
    read_lines(log, folder.metrics)
    if log.best_epoch is not None and folder.evaluation(int(log.best_epoch)).is_file():
        table = pq.read_table(folder.evaluation(int(log.best_epoch)))
        log.examples = {
            name: table[name].to_numpy().astype(float) for name in table.column_names if name not in ("origin", "group")
        }
    return log


def read_lines(log: TrialLog, file: Path) -> None:
    """Put the lines of a `metrics.jsonl` into a log; a last line that is being written is left out."""
    if not file.is_file():
        return
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            add_row(log, json.loads(line))
        except ValueError:
            break


def add_row(log: TrialLog, row: Mapping[str, Any]) -> None:
    """Put one logged row where it belongs."""
    evaluation, numbers = split_metrics(row)
    rows: list[Row] = log.evaluations if evaluation else log.steps
    rows.append(numbers)


def _compare_weights(run: RunFolder, logs: Iterable[TrialLog], selection: Mapping[str, Any]) -> None:
    """Hash what lies in the folders of the best weights again."""
    for log in logs:
        record = run.trial(log.name).record
        if not record.is_file():
            continue
        expected = run.read_json(record)["best_fingerprint"]
        folders = [run.trial(log.name).best] if log.status == "finished" else []
        if selection and selection["winner"] == log.name:
            folders.append(run.best)
        for folder in folders:
            found = saved_fingerprint(folder) if folder.is_dir() else "none"
            if found != expected:
                place = folder.relative_to(run.root)
                log.saved = f"{place} holds weights {found}, but epoch {log.best_epoch} wrote {expected}"


def _prompts(run: RunFolder) -> dict[str, list[int]]:
    if not run.pairs.is_file():
        return {}
    table = pq.read_table(run.pairs, columns=["split", "prompt"])
    prompts: dict[str, list[int]] = {}
    for split, prompt in zip(table["split"].to_pylist(), table["prompt"].to_pylist(), strict=True):
        prompts.setdefault(split, []).append(prompt)
    return prompts


def _json(run: RunFolder, path: Path) -> dict[str, Any]:
    found: dict[str, Any] = run.read_json(path) if path.is_file() else {}
    return found
