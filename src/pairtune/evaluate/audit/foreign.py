"""Evidence from logs made elsewhere: TRL's `trainer_state.json`, tables with TRL's column names, W&B offline runs."""

from __future__ import annotations

import csv
import json
import math
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pairtune.errors import BadInput, one_line
from pairtune.evaluate.audit.evidence import Evidence, TrialLog
from pairtune.evaluate.audit.own_runs import add_row
from pairtune.extras import require

STATE = "trainer_state.json"

# Column titles of printed tables, and TRL's names for them.
_TITLES = {
    "training loss": "loss",
    "validation loss": "eval_loss",
    "lr": "learning_rate",
    "trial": "run",
    "name": "run",
}
_CLEARLY = 0.01  # a rise of the evaluation loss that counts
_NO_VALUE = ("", "no log", "none", "-")


def evidence_of_csv(path: Path) -> Evidence:
    """Read a table with one row per evaluation; trials are told apart by `run`, or else by learning rate and beta.

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
    titles = {_name(title) for title in rows[0] if title}
    if not titles & {"eval_loss", "loss", "rewards/chosen", "eval_rewards/chosen"}:
        raise BadInput(f"{path}: has neither eval_loss nor rewards/chosen among its columns ({', '.join(rows[0])})")
    # In a log of steps the learning rate follows its schedule, so it does not identify trials.
    told_by = ("run", "beta") if "grad_norm" in titles else ("run", "learning_rate", "beta")
    trials: dict[tuple[str, ...], TrialLog] = {}
    for number, cells in enumerate(rows, 2):
        named = _named(cells, f"{path}, row {number}")
        numbers = {name: value for name, value in named.items() if name not in told_by}
        if not any(name in numbers or f"eval_{name}" in numbers for name in ("loss", "rewards/chosen")):
            continue  # such as the summary at the end of training
        key = tuple(str(named.get(name, "")) for name in told_by)
        if key not in trials:
            rate = named.get("learning_rate") if "learning_rate" in told_by else None
            trials[key] = TrialLog(_trial_name(named, len(trials) + 1), rate, named.get("beta"))
        add_row(trials[key], _as_evaluation(numbers))
    return Evidence(path, "CSV", list(trials.values()))


def _name(title: str) -> str:
    """TRL's name for a column with this title."""
    lower = title.strip().lower()
    return _TITLES.get(lower, lower)


def _named(cells: Mapping[str | None, Any], where: str) -> dict[str, Any]:
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
            if name.endswith("rewards/accuracies") and not 0 <= named.get(name, 0) <= 1:
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


def evidence_of_trainer_states(path: Path) -> Evidence:
    """Read one `trainer_state.json`, or all below a folder; of one training run's checkpoints, the last.

    Raises:
        BadInput: a file is not a trainer_state.json.
    """
    files = [path] if path.is_file() else sorted(path.rglob(STATE))
    latest: dict[Path, tuple[float, Path, dict[str, Any]]] = {}
    for file in files:
        state = _trainer_state(file)
        of_checkpoint = file.parent.name.startswith("checkpoint-")
        training = file.parent.parent if of_checkpoint and path != file else file.parent
        step = float(state.get("global_step") or 0)
        if training not in latest or step >= latest[training][0]:
            latest[training] = step, file, state
    trials = [
        _log_of_state(_training_name(training, path), state, training) for training, (_, _, state) in latest.items()
    ]
    return Evidence(path, "TRL trainer_state.json", trials)


def _training_name(training: Path, path: Path) -> str:
    if path.is_file() or training == path:
        return training.resolve().name
    return str(training.relative_to(path))


def _trainer_state(file: Path) -> dict[str, Any]:
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{file}: cannot be read as JSON ({one_line(error)})") from error
    if not isinstance(state, dict) or not isinstance(state.get("log_history"), list):
        raise BadInput(f"{file}: has no log_history, so it is not a trainer_state.json")
    return state


def _log_of_state(name: str, state: Mapping[str, Any], training: Path) -> TrialLog:
    log = TrialLog(name)
    for row in state["log_history"]:
        if isinstance(row, dict) and ("loss" in row or "eval_loss" in row):
            add_row(log, row)
    _compare_steps(log, state, training)
    return log


def _compare_steps(log: TrialLog, state: Mapping[str, Any], training: Path) -> None:
    """Check that the trainer's best checkpoint is that of the best evaluation."""
    losses = [(row["loss"], row.get("step")) for row in log.evaluations if math.isfinite(row.get("loss", math.nan))]
    checkpoint, step = state.get("best_model_checkpoint"), state.get("global_step")
    if len(losses) < 2:
        return
    lowest, best_step = min(losses)
    if checkpoint:
        saved_step = str(checkpoint).rpartition("-")[2]
        metric = state.get("best_metric")
        by_loss = metric is not None and any(math.isclose(metric, loss, rel_tol=1e-6) for loss, _ in losses)
        if by_loss and saved_step.isdigit() and best_step is not None and int(saved_step) != int(best_step):
            log.saved = (
                f"the best checkpoint is from step {saved_step}, but the lowest evaluation loss ({lowest:.6f}) is from "
                f"step {best_step:g}"
            )
        return
    risen = losses[-1][0] > lowest + _CLEARLY
    if step and best_step is not None and risen and not (training / f"checkpoint-{best_step:g}").is_dir():
        log.left = (
            f"no best checkpoint was kept: the weights are those of step {step:g} (evaluation loss "
            f"{losses[-1][0]:.6f}), but the lowest loss was {lowest:.6f} at step {best_step:g}"
        )


def evidence_of_wandb(path: Path) -> Evidence:
    """Read one W&B offline run folder, or a folder of them (`wandb/offline-run-*`).

    Raises:
        BadInput: there is no run, one is damaged, or the package `wandb` is not installed.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.wandb")) or sorted(path.rglob("*.wandb"))
    return Evidence(path, "W&B offline run", [_log_of_wandb(file) for file in files])


def _log_of_wandb(file: Path) -> TrialLog:
    log = TrialLog(file.parent.name)
    config: dict[str, Any] = {}
    for record in _wandb_records(file):
        if record.HasField("run"):
            log.name = record.run.display_name or log.name
            config |= {item.key: _value(item.value_json) for item in record.run.config.update}
        elif record.HasField("config"):
            config |= {item.key: _value(item.value_json) for item in record.config.update}
        elif record.HasField("history"):
            row = {item.key or "/".join(item.nested_key): _value(item.value_json) for item in record.history.item}
            add_row(log, _trl_names(row))
    log.beta, log.learning_rate = _setting(config, "beta"), _setting(config, "learning_rate")
    kinds = config.get(
        "loss_type", config.get("loss", log.loss)
    )  # TRL logs `loss_type`, possibly a list; Pairtune logs `loss`
    kinds = kinds if isinstance(kinds, list) else [kinds]
    log.loss = str(kinds[0]) if len(kinds) == 1 else "several"
    return log


def _trl_names(row: Mapping[str, Any]) -> dict[str, Any]:
    """A W&B row under TRL's names: transformers logs `train/loss` and `eval/loss`."""
    named = {}
    for name, value in row.items():
        if name.startswith("eval/"):
            named["eval_" + name.removeprefix("eval/")] = value
        elif name in ("train/global_step", "_step"):
            named.setdefault("step", value)
        else:
            named[name.removeprefix("train/")] = value
    return {name: value for name, value in named.items() if not name.startswith("_")}


def _setting(config: Mapping[str, Any], name: str) -> float | None:
    value = config.get(name)
    return float(value) if isinstance(value, int | float) else None


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


# W&B's file format: a header of 7 bytes, then LevelDB's log format. Blocks of 32 KiB hold pieces, each with checksum,
# length and type; a record is one whole piece, or a first, any middle and a last one.
_WANDB_HEADER, _WANDB_BLOCK, _WANDB_PIECE = b":W&B", 32768, struct.Struct("<IHB")
_WHOLE, _FIRST, _LAST = 1, 2, 4


def _wandb_records(file: Path) -> Iterator[Any]:
    """The records of a run's file; where its writer was killed, those up to the last whole one."""
    require("wandb", f"{file}: a W&B run")
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    content = file.read_bytes()
    if not content.startswith(_WANDB_HEADER):
        raise BadInput(f"{file}: is not a W&B run")
    try:
        for data in _wandb_data(content):
            record = Record()
            record.ParseFromString(data)
            yield record
    except (ValueError, DecodeError) as error:
        raise BadInput(f"{file}: the W&B run is damaged ({one_line(error)})") from error


def _wandb_data(content: bytes) -> Iterator[bytes]:
    place, pieces = len(_WANDB_HEADER) + 3, b""
    while place + _WANDB_PIECE.size <= len(content):
        left = _WANDB_BLOCK - place % _WANDB_BLOCK
        if left < _WANDB_PIECE.size:  # too short for a piece: padding
            place += left
            continue
        checksum, length, kind = _WANDB_PIECE.unpack_from(content, place)
        piece = content[place + _WANDB_PIECE.size : place + _WANDB_PIECE.size + length]
        if len(piece) < length:
            return  # still being written, or truncated
        if zlib.crc32(piece, zlib.crc32(bytes([kind]))) != checksum:
            raise ValueError(f"wrong checksum at byte {place}")
        pieces = piece if kind in (_WHOLE, _FIRST) else pieces + piece
        if kind in (_WHOLE, _LAST):
            yield pieces
        place += _WANDB_PIECE.size + length


def with_options(
    evidence: Evidence, eval_rows: int | None, batch_size: int | None, betas: Sequence[float] | None
) -> Evidence:
    """Add what a log does not record.

    Raises:
        BadInput: the number of betas is neither 1 nor the number of trials.
    """
    if betas and len(betas) not in (1, len(evidence.trials)):
        trials = f"{len(evidence.trials)} trial{'' if len(evidence.trials) == 1 else 's'}"
        raise BadInput(f"--beta: {len(betas)} given for {trials}; give one, or one for each trial")
    for place, trial in enumerate(evidence.trials):
        trial.eval_rows = eval_rows or trial.eval_rows
        trial.batch_size = batch_size or trial.batch_size
        if betas:
            trial.beta = betas[place % len(betas)]
    return evidence
