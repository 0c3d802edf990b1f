"""Evidence from transformers' and TRL's logs: `trainer_state.json`, and bare lists of its rows."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pairtune.errors import BadInput, one_line
from pairtune.evaluation.audit.evidence import Evidence, TrialLog
from pairtune.evaluation.audit.logged_rows import add_rows, describe, number_of, trl_names

STATE = "trainer_state.json"
_CLEARLY = 0.01  # a rise of the evaluation loss that counts


def evidence_of_trainer_states(path: Path) -> Evidence:
    """Read one `trainer_state.json`, or all below a folder; of one training run's checkpoints, the last.

    A file may also hold only the list of rows (`log_history`), as JSON or as JSON lines, under TRL's names or W&B's.

    Raises:
        BadInput: a file is none of these.
    """
    files = [path] if path.is_file() else sorted(_below(path), key=_natural)
    latest: dict[Path, tuple[float, Path, dict[str, Any]]] = {}
    for file in files:
        state = _trainer_state(file)
        of_checkpoint = file.parent.name.startswith(("checkpoint-", "tmp-checkpoint-"))
        training = file.parent.parent if of_checkpoint and path not in (file, file.parent) else file.parent
        step = number_of(state.get("global_step")) or 0.0
        if training not in latest or step >= latest[training][0]:
            latest[training] = step, file, state
    trials = [
        _log_of_state(_training_name(training, path), state, training) for training, (_, _, state) in latest.items()
    ]
    return Evidence(path, "TRL trainer_state.json", trials)


def _below(path: Path) -> Iterator[Path]:
    """The logs in a folder.

    Raises:
        BadInput: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise BadInput(f"{error.filename}: cannot be read ({error.strerror})")

    for folder, _, files in os.walk(path, onerror=refuse):
        if STATE in files:
            yield Path(folder) / STATE


def _natural(path: Path) -> list[tuple[int, str]]:
    """A key by which trial-10 comes after trial-2."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def _training_name(training: Path, path: Path) -> str:
    if path.is_file() or training == path:
        return training.resolve().name
    return str(training.relative_to(path))


def _trainer_state(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8-sig")
        lines = file.suffix.lower() == ".jsonl"
        state = [json.loads(line) for line in text.split("\n") if line.strip()] if lines else json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{file}: cannot be read as JSON ({one_line(error)})") from error
    if isinstance(state, list):
        state = {"log_history": state}
    rows = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(rows, list) or not any(_is_row(row) for row in rows):
        raise BadInput(f"{file}: has no log_history with losses, so it is neither a trainer_state.json nor its rows")
    return {**state, "log_history": [trl_names(row) for row in rows if isinstance(row, dict)]}


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and any(name in row for name in ("loss", "eval_loss", "train/loss", "eval/loss"))


def _log_of_state(name: str, state: Mapping[str, Any], training: Path) -> TrialLog:
    log = TrialLog(name)
    add_rows(log, state["log_history"])
    params = state.get("trial_params")
    describe(log, _settings_beside(training) | (params if isinstance(params, dict) else {}))
    _compare_steps(log, state, training)
    return log


def _settings_beside(training: Path) -> dict[str, Any]:
    """The settings in JSON files beside a log, and the method that TRL's model card names.

    `training_args.bin` is not read: it is a pickle, which can run any code.
    """
    settings: dict[str, Any] = {}
    for file in sorted(training.glob("*.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8")) if file.name != STATE else {}
        except (OSError, ValueError, RecursionError):
            continue
        # The arguments of a preference trainer; a model's or a scheduler's config may have a loss_type or a beta too.
        if isinstance(content, dict) and "beta" in content and {"loss_type", "learning_rate"} & content.keys():
            settings |= content
    card = training / "README.md"
    if "loss_type" not in settings and card.is_file():
        method = _METHOD.search(card.read_text(encoding="utf-8", errors="replace"))
        if method and method[1] in ("CPO", "ORPO"):
            settings["loss_type"] = method[1].lower()
    return settings


# What TRL's model cards say.
_METHOD = re.compile(r"This model was trained with ([A-Z]+)")


def _check_best(log: TrialLog, state: Mapping[str, Any], checkpoint: str) -> None:
    """Compare the best checkpoint and its metric with the evaluations."""
    saved_step, metric = checkpoint.rpartition("-")[2], number_of(state.get("best_metric"))
    if not re.fullmatch(r"[0-9]{1,12}", saved_step) or metric is None:
        return
    best_step = number_of(state.get("best_global_step"))
    if best_step is not None and best_step != int(saved_step):
        log.saved = f"the best checkpoint is from step {saved_step}, but best_global_step is {best_step:g}"
    of_step = [row for row in log.evaluations if row.get("step") == int(saved_step)]
    log.best_epoch = of_step[-1].get("epoch") if of_step else None
    named = {name for row in of_step for name, value in row.items() if _same(value, metric)}
    lowest = min(log.evaluations, key=lambda row: row.get("loss", math.inf), default={})
    if named == {"loss"} and lowest.get("loss", math.inf) < metric and not _same(lowest["loss"], metric):
        log.saved = (
            f"the best checkpoint is from step {saved_step}, but the lowest evaluation loss ({lowest['loss']:.6f}) is "
            f"from step {lowest.get('step', math.nan):g}"
        )
    if named:
        return
    of_metric = [row for row in log.evaluations if any(_same(value, metric) for value in row.values())]
    if of_metric and of_step:
        log.saved = (
            f"the best checkpoint is from step {saved_step}, but its metric ({metric:.6f}) is that of the evaluation "
            f"at step {of_metric[0].get('step', math.nan):g}"
        )
    elif of_step:
        log.saved = f"the best checkpoint's metric ({metric:.6f}) is in no evaluation, nor in that of step {saved_step}"


def _same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-6)


def _compare_steps(log: TrialLog, state: Mapping[str, Any], training: Path) -> None:
    """Check that the trainer's best checkpoint is that of the best evaluation."""
    losses = [(row["loss"], row.get("step")) for row in log.evaluations if math.isfinite(row.get("loss", math.nan))]
    checkpoint, step = state.get("best_model_checkpoint"), number_of(state.get("global_step"))
    if checkpoint:
        _check_best(log, state, str(checkpoint))
        return
    if len(losses) < 2:
        return
    lowest, best_step = min(losses)
    risen = losses[-1][0] > lowest + _CLEARLY
    if step and best_step is not None and risen and not (training / f"checkpoint-{best_step:g}").is_dir():
        log.left = (
            f"no best checkpoint was kept: the weights are those of step {step:g} (evaluation loss "
            f"{losses[-1][0]:.6f}), but the lowest loss was {lowest:.6f} at step {best_step:g}"
        )
