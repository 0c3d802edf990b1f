"""The curves of a trial: what is plotted, whatever draws it (figures of a report, a live page)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from pairtune.run.folder import Trial

Points = list[tuple[float, float]]

_LN_2 = math.log(2)
_TRAINING_POINTS = 40


@dataclass(frozen=True)
class Series:
    """One curve of every trial.

    Attributes:
        name: short name, for files and ids.
        title: title of its figure.
        points: a trial's points: epoch and value.
        base_level: the value that means "same as the base model"; None: there is none.
        marked: whether each point is a measurement of its own, rather than a mean of several.
    """

    name: str
    title: str
    points: Callable[[Trial], Points]
    base_level: float | None = None
    marked: bool = True


def _training_loss(trial: Trial) -> Points:
    """The training loss, averaged over neighbouring steps."""
    steps = trial.log.steps
    size = max(1, len(steps) // _TRAINING_POINTS)
    parts = [steps[start : start + size] for start in range(0, len(steps), size)]
    return [(part[-1].epoch, math.fsum(step.loss for step in part) / len(part)) for part in parts]


def _evaluated(metric: str, start: float | None = None) -> Callable[[Trial], Points]:
    """An evaluation metric by epoch, with the base model's value as the point of epoch 0 if it is known."""

    def points(trial: Trial) -> Points:
        found = [(float(each.epoch), value) for each in trial.evaluations if (value := each.metric(metric)) is not None]
        return [(0.0, start), *found] if found and start is not None else found

    return points


def _validation_loss(trial: Trial) -> Points:
    config = trial.config
    plain = config and config.loss == "sigmoid" and not config.sft_weight
    return _evaluated("eval_loss", _LN_2 if plain else None)(trial)


def _logps_change(answer: str) -> Callable[[Trial], Points]:
    """Change of an answer's log-prob from the base model: its reward over beta."""

    def points(trial: Trial) -> Points:
        beta = trial.config.beta if trial.config else None
        return [(x, y / beta) for x, y in _evaluated(f"eval_rewards/{answer}", 0.0)(trial)] if beta else []

    return points


SERIES = (
    Series("training-loss", "Training loss", _training_loss, marked=False),
    Series("loss", "Validation loss", _validation_loss),
    Series("accuracy", "Validation accuracy", _evaluated("eval_rewards/accuracies"), 0.5),
    Series("margin", "Reward margin", _evaluated("eval_rewards/margins", 0.0), 0.0),
    Series("chosen", "Chosen log-probs, change (nats)", _logps_change("chosen"), 0.0),
    Series("rejected", "Rejected log-probs, change (nats)", _logps_change("rejected"), 0.0),
    Series("kl", "KL from the base (nats per token)", _evaluated("eval_kl", 0.0), 0.0),
)
