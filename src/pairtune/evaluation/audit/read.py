"""Read evidence from a path, whatever its format."""

from __future__ import annotations

from pathlib import Path

from pairtune.errors import BadInput, one_line
from pairtune.evaluation.audit.evidence import RUN_FOLDER, Evidence
from pairtune.evaluation.audit.own_runs import evidence_of_run
from pairtune.evaluation.audit.tables import evidence_of_csv
from pairtune.evaluation.audit.trainer_states import STATE, evidence_of_trainer_states
from pairtune.evaluation.audit.wandb_logs import evidence_of_wandb
from pairtune.run.folder import find_run, is_run

_KINDS = "a run folder, a trainer_state.json (or a folder of them), its rows as .json or .jsonl, a .csv, or a W&B run"


def read_evidence(path: Path) -> Evidence:
    """Read the evidence at `path`.

    Raises:
        BadInput: there is nothing at `path` that can be audited, or it cannot be read.
    """
    try:
        found = _read(path)
    except (OSError, RecursionError) as error:
        raise BadInput(f"{path}: cannot be read ({one_line(error)})") from error
    if found.kind != RUN_FOLDER and not any(trial.steps or trial.evaluations for trial in found.trials):
        raise BadInput(f"{path}: has no logged rows with losses or rewards")
    return found


def _read(path: Path) -> Evidence:
    if path.is_file():
        states = evidence_of_trainer_states
        readers = {".csv": evidence_of_csv, ".json": states, ".jsonl": states, ".wandb": evidence_of_wandb}
        if reader := readers.get(path.suffix.lower()):
            return reader(path)
    elif path.is_dir():
        if (found := find_run(path)) and is_run(found[0].root):
            return evidence_of_run(found[0].root)
        if next(path.rglob(STATE), None):
            return evidence_of_trainer_states(path)
        if next(path.rglob("*.wandb"), None):
            return evidence_of_wandb(path)
    else:
        raise BadInput(f"{path}: no such file or folder; give {_KINDS}")
    raise BadInput(f"{path}: cannot be audited; give {_KINDS}")
