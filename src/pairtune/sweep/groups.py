"""Trials in groups that train side by side in lockstep, or one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from pairtune.config import TrialConfig
from pairtune.engine.trial import TrialInputs
from pairtune.run.folder import Run
from pairtune.run.records import TrialRecord
from pairtune.track.sinks import Sink

# Settings in which trials in lockstep may differ. All others must be equal: these trials share one pass over the same
# pairs in the same order, and their adapters have one shape.
_MAY_DIFFER = {
    "learning_rate",
    "beta",
    "loss",
    "label_smoothing",
    "sft_weight",
    "simpo_gamma",
    "discopop_tau",
    "epochs",
    "max_grad_norm",
    "patience",
}


class Engine(Protocol):
    """What `engine.native` and `engine.trl` have in common."""

    def run_trials(self, trials: list[TrialConfig], inputs: TrialInputs, run: Run, sink: Sink) -> list[TrialRecord]:
        """Train trials side by side."""

    def checkpointed(self, run: Run) -> list[TrialRecord]:
        """The records of the trials that can resume from the run's checkpoint, as of that checkpoint."""

    def width(self, trial: TrialConfig, inputs: TrialInputs, asked: int | None) -> int:
        """How many trials like this one run side by side."""


def train_in_groups(
    trials: Sequence[TrialConfig],
    done: Mapping[str, TrialRecord],
    engine: Engine,
    inputs: TrialInputs,
    run: Run,
    sink: Sink,
    asked: int | None,
) -> Iterator[list[TrialRecord]]:
    """Train the trials that are not done, group by group.

    Args:
        trials: the trials.
        done: the records of those that have ended.
        engine: trains a group.
        inputs: what the trials share.
        run: the run, whose checkpoint may hold some of them.
        sink: receives every step and evaluation.
        asked: how many are to run side by side; None: as many as fit in memory.

    Yields:
        The records of each group.
    """
    for group in _groups(trials, done, engine, inputs, run, asked):
        yield engine.run_trials(group, inputs, run, sink)


def lockstep_key(trial: TrialConfig) -> Any:
    """A key that is equal for trials that can run in lockstep."""
    if trial.method == "full":
        return trial.name
    return tuple((name, value) for name, value in trial if name not in _MAY_DIFFER)


def _groups(
    trials: Sequence[TrialConfig],
    done: Mapping[str, TrialRecord],
    engine: Engine,
    inputs: TrialInputs,
    run: Run,
    asked: int | None,
) -> list[list[TrialConfig]]:
    """The trials left to run, in lockstep groups; those in the checkpoint come first."""
    held = [result.trial.name for result in engine.checkpointed(run)]
    groups = []
    if any(trial.name in held and trial.name not in done for trial in trials):
        groups.append([trial for trial in trials if trial.name in held])
    by_kind: dict[Any, list[TrialConfig]] = {}
    for trial in trials:
        if trial.name not in done and not any(trial in group for group in groups):
            by_kind.setdefault(lockstep_key(trial), []).append(trial)
    for alike in by_kind.values():
        width = engine.width(alike[0], inputs, asked or run.choices.side_by_side)
        if inputs.processes.first:
            run.remember(side_by_side=width)
        rounds = -(-len(alike) // width)
        width = -(-len(alike) // rounds)  # five trials where four fit: three and two, not four and one
        groups += [alike[start : start + width] for start in range(0, len(alike), width)]
    return groups
