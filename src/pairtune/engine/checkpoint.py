"""The state of the trials being trained, in one file that is replaced atomically: what a killed run resumes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pairtune.errors import RunFailed
from pairtune.files import replacing
from pairtune.run.records import Part, TrialRecord, dump


class CheckpointedTrial(Part):
    """One trial being trained.

    Attributes:
        result: the trial's record so far.
        losses: losses of the training pairs seen in the current epoch.
        lines: number of lines in its `metrics.jsonl`.
        updates: number of optimizer steps made.
    """

    result: TrialRecord
    losses: list[float]
    lines: int
    updates: int


class CheckpointState(Part):
    """The progress of trials that are trained together.

    Attributes:
        of: fingerprint of the settings, the pairs and the base model.
        epoch: the current epoch, counted from 1.
        step: the last completed step.
        seen: number of training pairs seen in the current epoch.
        members: the trials, in order.
    """

    of: str
    epoch: int
    step: int
    seen: int
    members: list[CheckpointedTrial]


def write_checkpoint(path: Path, state: CheckpointState, tensors: Mapping[str, Tensor]) -> None:
    """Replace the checkpoint.

    Raises:
        RunFailed: it cannot be written, for example because the disk is full; the previous checkpoint is untouched.
    """
    try:
        with replacing(path) as temporary:
            save_file(dict(tensors), temporary, metadata={"state": json.dumps(dump(state))})
    except (OSError, SafetensorError) as error:
        raise RunFailed(
            f"{path}: the checkpoint cannot be written ({error}); free some disk space, then `pairtune resume` "
            "continues from the previous checkpoint"
        ) from error


def read_state(path: Path) -> CheckpointState | None:
    """The state in a checkpoint, without its tensors; None if there is no checkpoint.

    Raises:
        RunFailed: the file is damaged.
    """
    return _read(path, tensors=False)[0] if path.is_file() else None


def read_checkpoint(path: Path) -> tuple[CheckpointState, dict[str, Tensor]]:
    """A checkpoint's state and tensors.

    Raises:
        RunFailed: the file is damaged.
    """
    return _read(path, tensors=True)


def _read(path: Path, *, tensors: bool) -> tuple[CheckpointState, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys() if tensors else []
            state = CheckpointState.model_validate(json.loads(file.metadata()["state"]))
            return state, {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, ValidationError) as error:
        raise RunFailed(
            f"{path}: the checkpoint is damaged; remove it, and `pairtune resume` restarts its trials from epoch 1"
        ) from error
