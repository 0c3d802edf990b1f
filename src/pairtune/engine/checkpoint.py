"""The state of trials in training, in one file that is replaced as a whole: what a killed run goes on from."""

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
    """One trial in training.

    Attributes:
        result: as far as it is.
        losses: of the epoch's training pairs so far.
        lines: of its `metrics.jsonl`.
        updates: of its weights.
    """

    result: TrialRecord
    losses: list[float]
    lines: int
    updates: int


class CheckpointState(Part):
    """Where trials that are trained together stand.

    Attributes:
        of: a fingerprint of settings, pairs and base model.
        epoch: that is trained, counted from 1.
        step: that was made last.
        seen: pairs of the epoch.
        members: the trials, in their order.
    """

    of: str
    epoch: int
    step: int
    seen: int
    members: list[CheckpointedTrial]


def write_checkpoint(path: Path, state: CheckpointState, tensors: Mapping[str, Tensor]) -> None:
    """Replace the checkpoint.

    Raises:
        RunFailed: it cannot be written (a full disk, for one); the one before is untouched.
    """
    try:
        with replacing(path) as temporary:
            save_file(dict(tensors), temporary, metadata={"state": json.dumps(dump(state))})
    except (OSError, SafetensorError) as error:
        raise RunFailed(
            f"{path}: the checkpoint cannot be written ({error}); make room, then `pairtune resume` goes on from the "
            "one before"
        ) from error


def read_state(path: Path) -> CheckpointState | None:
    """The state in a checkpoint, without its tensors; None: there is no checkpoint.

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
            f"{path}: the checkpoint is damaged; remove it, and `pairtune resume` trains its trials from their start"
        ) from error
