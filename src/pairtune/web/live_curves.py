"""Training curves as lightweight SVG, quick enough for live pages. Reports have their own figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pairtune.run.metrics import Evaluation, TrainingStep
from pairtune.web.run_view import ShownTrial

WIDTH, HEIGHT = 320, 160
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 8, 8, 22
_POINTS = 200  # per line; more are indistinguishable at this width


@dataclass(frozen=True)
class Line:
    """One trial's line: points of an SVG polyline, and the positions of its marks."""

    name: str
    number: int
    points: str
    marks: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Curve:
    """One figure."""

    title: str
    lines: tuple[Line, ...]
    levels: tuple[tuple[float, str], ...]  # y position, label
    ends: tuple[str, str]
    said: str


def curves(trials: Sequence[ShownTrial]) -> list[Curve]:
    """Training loss by step, and evaluation metrics by epoch."""
    found = [
        _curve("Training loss", [(each.name, _smooth(_series(each.steps, "loss"))) for each in trials], marked=False)
    ]
    for title, metric in (
        ("Validation loss", "eval_loss"),
        ("Validation accuracy", "eval_rewards/accuracies"),
        ("Reward margin", "eval_rewards/margins"),
    ):
        found.append(_curve(title, [(each.name, _series(each.evaluations, metric)) for each in trials], marked=True))
    return [each for each in found if each is not None]


def _series(lines: Sequence[TrainingStep] | Sequence[Evaluation], metric: str) -> list[tuple[float, float]]:
    return [(line.epoch, value) for line in lines if (value := line.metric(metric)) is not None]


def _smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Moving averages, so that noisy steps of a few pairs show their trend."""
    width = max(1, len(points) // 40)
    step = max(1, len(points) // _POINTS)
    found = []
    for index in range(0, len(points), step):
        near = points[max(0, index - width) : index + width + 1]
        found.append((points[index][0], sum(y for _, y in near) / len(near)))
    return found


def _curve(title: str, series: Sequence[tuple[str, list[tuple[float, float]]]], *, marked: bool) -> Curve | None:
    points = [point for _, line in series for point in line if math.isfinite(point[1])]
    if not points:
        return None
    low, high = min(y for _, y in points), max(y for _, y in points)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    right = max(1.0, *(x for x, _ in points))

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + x / right * (WIDTH - _LEFT - _RIGHT)
        up = HEIGHT - _BOTTOM - (y - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)
        return round(across, 1), round(up, 1)

    lines = []
    for number, (name, line) in enumerate(series):
        placed = [place(x, y) for x, y in line if math.isfinite(y)]
        marks = tuple(placed) if marked else ()
        lines.append(Line(name, number % 8, " ".join(f"{x},{y}" for x, y in placed), marks))
    levels = tuple((place(0, value)[1], f"{value:.3g}") for value in (low, (low + high) / 2, high))
    last = "; ".join(f"{name} {line[-1][1]:.4g}" for name, line in series if line)
    return Curve(title, tuple(lines), levels, ("0", f"epoch {right:g}"), f"{title}, last values: {last}")
