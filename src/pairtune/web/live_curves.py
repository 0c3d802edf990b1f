"""Training curves as lightweight SVG, quick enough for live pages. Reports have their own figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pairtune.report.series import SERIES, Series
from pairtune.run.folder import Trial

WIDTH, HEIGHT = 320, 160
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 8, 8, 22
_SHOWN = ("training-loss", "loss", "accuracy", "margin")


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


def curves(trials: Sequence[Trial]) -> list[Curve]:
    """The curves that a live page shows, as far as the trials have come."""
    found = [_curve(series, trials) for series in SERIES if series.name in _SHOWN]
    return [each for each in found if each is not None]


def _curve(series: Series, trials: Sequence[Trial]) -> Curve | None:
    named = [(trial.name, series.points(trial)) for trial in trials]
    points = [point for _, line in named for point in line if math.isfinite(point[1])]
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
    for number, (name, line) in enumerate(named):
        placed = [place(x, y) for x, y in line if math.isfinite(y)]
        marks = tuple(placed) if series.marked else ()
        lines.append(Line(name, number % 8, " ".join(f"{x},{y}" for x, y in placed), marks))
    levels = tuple((place(0, value)[1], f"{value:.3g}") for value in (low, (low + high) / 2, high))
    last = "; ".join(f"{name} {line[-1][1]:.4g}" for name, line in named if line)
    return Curve(series.title, tuple(lines), levels, ("0", f"epoch {right:g}"), f"{series.title}, last values: {last}")
