"""The curves of a trial as charts: what is plotted, whatever page shows it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pairtune.errors import BadInput
from pairtune.report.charts import Chart, Line, Point
from pairtune.run.cache import FileCache
from pairtune.run.examples import Examples
from pairtune.run.folder import Trial
from pairtune.run.metrics import Evaluation
from pairtune.run.records import Interval
from pairtune.statistics import metric_intervals

# Where a click on a trial's evaluation leads: trial, epoch, address.
Link = Callable[[Trial, int], str]

_LN_2 = math.log(2)
_TRAINING_POINTS = 40
_INTERVALS = FileCache()


@dataclass(frozen=True)
class Series:
    """One curve of every trial.

    Attributes:
        name: short name, for files and ids.
        title: title of its figure.
        points: a trial's points.
        base: the value that means "same as the base model", given the trials; None: there is none.
        base_label: what that value is called.
        bounds: ends that the axis may not pass.
        marked: whether each point is a measurement of its own, rather than a mean of several.
    """

    name: str
    title: str
    points: Callable[[Trial, Link | None], list[Point]]
    base: Callable[[Sequence[Trial]], float | None]
    base_label: str = "base"
    bounds: tuple[float, float] = (-math.inf, math.inf)
    marked: bool = True


def charts(trials: Sequence[Trial], winner: str | None, link: Link | None = None) -> dict[str, Chart]:
    """The charts that the trials' records allow, by name.

    Args:
        trials: the trials, in grid order.
        winner: the name of the selected trial.
        link: where a click on an evaluation leads.
    """
    found = {}
    for series in SERIES:
        drawn = [
            Line(trial.label, number, points, winner=trial.name == winner)
            for number, trial in enumerate(trials)
            if (points := series.points(trial, link))
        ]
        if drawn:
            base = series.base(trials)
            found[series.name] = Chart(series.title, drawn, base, series.base_label, series.bounds, series.marked)
    return found


def intervals(trial: Trial, epoch: int) -> dict[str, Interval]:
    """The 95 % intervals of an evaluation's means, by metric; empty if its pairs were not recorded."""
    file = trial.paths.examples(epoch)
    if not file.is_file():
        return {}

    def read() -> dict[str, Interval]:
        examples = Examples.read(file)
        return metric_intervals(examples.metrics, examples.groups, examples.cases)

    try:
        found: dict[str, Interval] = _INTERVALS.get(file, read)
    except (BadInput, KeyError, ValueError):  # a damaged file; the run's page says so
        return {}
    return found


def _training_loss(trial: Trial, _: Link | None) -> list[Point]:
    """The training loss, averaged over neighbouring steps."""
    steps = trial.log.steps
    size = max(1, len(steps) // _TRAINING_POINTS)
    parts = [steps[start : start + size] for start in range(0, len(steps), size)]
    return [Point(part[-1].epoch, math.fsum(step.loss for step in part) / len(part)) for part in parts]


def _evaluated(
    metric: str,
    start: Callable[[Trial], float | None] = lambda trial: None,
    scale: Callable[[Trial], float] | None = None,
) -> Callable[[Trial, Link | None], list[Point]]:
    """An evaluation metric by epoch, with the base model's value as the point of epoch 0 if it is known."""

    def points(trial: Trial, link: Link | None) -> list[Point]:
        factor = scale(trial) if scale else 1.0
        found = [
            _point(trial, each, value * factor, intervals(trial, each.epoch).get(metric), factor, link)
            for each in trial.evaluations
            if (value := each.metric(metric)) is not None
        ]
        first = start(trial)
        return [Point(0.0, first), *found] if found and first is not None else found

    return points


def _point(
    trial: Trial, evaluation: Evaluation, value: float, interval: Interval | None, factor: float, link: Link | None
) -> Point:
    ends = (interval[0] * factor, interval[1] * factor) if interval else None
    return Point(float(evaluation.epoch), value, ends, link(trial, evaluation.epoch) if link else None)


def _zero(_: Trial) -> float:
    return 0.0


def _base_loss(trial: Trial) -> float | None:
    """The base's own loss, where it is the same for every pair: ln 2 for the plain sigmoid loss."""
    config = trial.config
    return _LN_2 if config and config.loss == "sigmoid" and not (config.sft_weight or config.label_smoothing) else None


def _per_beta(trial: Trial) -> float:
    """From a reward to the change of a log-prob."""
    return 1 / trial.config.beta if trial.config else 1.0


def _shared_base_loss(trials: Sequence[Trial]) -> float | None:
    levels = {_base_loss(trial) for trial in trials}
    return levels.pop() if len(levels) == 1 else None


def _at(level: float | None) -> Callable[[Sequence[Trial]], float | None]:
    return lambda trials: level


SERIES = (
    Series("training-loss", "Training loss", _training_loss, _shared_base_loss, marked=False),
    Series("loss", "Validation loss", _evaluated("eval_loss", _base_loss), _shared_base_loss),
    # The base's rewards are 0 on every pair: it cannot tell the answers apart.
    Series("accuracy", "Validation accuracy", _evaluated("eval_rewards/accuracies"), _at(0.5), "chance", (0.0, 1.0)),
    Series("margin", "Reward margin", _evaluated("eval_rewards/margins", _zero), _at(0.0)),
    Series("chosen", "Chosen log-probs, change (nats)", _evaluated("eval_rewards/chosen", _zero, _per_beta), _at(0.0)),
    Series(
        "rejected", "Rejected log-probs, change (nats)", _evaluated("eval_rewards/rejected", _zero, _per_beta), _at(0.0)
    ),
    Series("kl", "KL from the base (nats per token)", _evaluated("eval_kl", _zero), _at(0.0)),
)
LIVE = ("training-loss", "loss", "accuracy", "margin")  # what a live page shows
