"""Charts as SVG, for the report, its figures and the site: one component, drawn from plain points.

Our own, since a live page draws four charts in a few milliseconds, which a plotting library does not, and since a
report has no scripts. Colours and fonts are in `static/charts.css`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from xml.sax.saxutils import escape, quoteattr

SERIES = 6  # colours and marks; further lines begin again
_WIDTH, _HEIGHT = 340, 216
_TOP, _RIGHT, _BOTTOM = 12, 14, 36
_LETTER = 6.2  # width of a digit, in units of the drawing
_SPARK_WIDTH, _SPARK_HEIGHT = 96, 24
_MOST_TICKS = 5
_LEAST_SPREAD, _LEAST = 1e-3, 1e-9
# A mark of about 7 units around the origin: circle, square, diamond, triangles.
_MARKS = (
    "M3.5 0A3.5 3.5 0 1 1-3.5 0 3.5 3.5 0 1 1 3.5 0Z",
    "M-3.1-3.1H3.1V3.1H-3.1Z",
    "M0-4.4 4.4 0 0 4.4-4.4 0Z",
    "M0-4.2 4 3.2H-4Z",
    "M0 4.2 4-3.2H-4Z",
    "M-1.3-4H1.3V-1.3H4V1.3H1.3V4H-1.3V1.3H-4V-1.3H-1.3Z",
)


@dataclass(frozen=True)
class Point:
    """One value.

    Attributes:
        x, y: where it lies.
        interval: the ends of its 95 % interval; None if it has none.
        link: where a click on it leads; None: nowhere.
    """

    x: float
    y: float
    interval: tuple[float, float] | None = None
    link: str | None = None


@dataclass(frozen=True)
class Line:
    """The points of one trial, in order; `number` decides colour and mark, `winner` lines are thicker."""

    label: str
    number: int
    points: Sequence[Point]
    winner: bool = False


@dataclass(frozen=True)
class Chart:
    """One figure.

    Attributes:
        title: what is drawn.
        lines: the trials.
        base: the value that means "same as the base model"; None if there is none.
        base_label: what that value is called.
        bounds: ends that the axis may not pass, as an accuracy's 0 and 1.
        marked: whether each point is a measurement of its own, rather than a mean of several.
    """

    title: str
    lines: Sequence[Line]
    base: float | None = None
    base_label: str = "base"
    bounds: tuple[float, float] = (-math.inf, math.inf)
    marked: bool = True


@dataclass(frozen=True)
class Axis:
    """One axis: its ends, and the values of its ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    @property
    def labels(self) -> list[str]:
        """The ticks' labels, all with the same number of decimals."""
        return [_number(tick, self.ticks[1] - self.ticks[0]) for tick in self.ticks]

    def share(self, value: float) -> float:
        """Where a value lies between the ends, 0 to 1."""
        return (value - self.low) / (self.high - self.low)


def nice_axis(low: float, high: float, bounds: tuple[float, float] = (-math.inf, math.inf)) -> Axis:
    """An axis from a tick at or below `low` to one at or above `high`, in steps of 1, 2 or 5 times a power of ten."""
    largest = max(abs(low), abs(high))
    if high - low < max(_LEAST_SPREAD * largest, _LEAST):  # else labels would need more digits than anybody reads
        around = largest / 10 if largest > _LEAST else 0.5
        low, high = low - around, high + around
    low, high = max(low, bounds[0]), min(high, bounds[1])
    rough = (high - low) / (_MOST_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(tick * step for tick in range(first, last + 1) if bounds[0] - 1e-9 <= tick * step <= bounds[1] + 1e-9)
    return Axis(max(ticks[0], bounds[0]), min(ticks[-1], bounds[1]), ticks)


def draw(chart: Chart) -> str:
    """An SVG element with a title and, for screen readers, a description; empty if there is no point to draw."""
    values = [point.y for line in chart.lines for point in line.points if math.isfinite(point.y)]
    if not values:
        return ""
    ends = [end for line in chart.lines for point in line.points for end in point.interval or () if math.isfinite(end)]
    shown = [*values, *ends, *([] if chart.base is None else [chart.base])]
    up = nice_axis(min(shown), max(shown), chart.bounds)
    across = _epochs(max((point.x for line in chart.lines for point in line.points), default=1.0))
    left = 10 + max(map(len, up.labels)) * _LETTER
    frame = _Frame(across, up, left)
    inside = [*frame.drawn(), *_base(chart, frame)]
    for line in chart.lines:
        inside += _bands(line, frame)
    for line in chart.lines:
        inside += _line(line, frame, chart.marked)
    said = escape(f"{chart.title}. {_described(chart)}")
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="group" aria-label={quoteattr(chart.title)}>'
        f"<desc>{said}</desc>{''.join(inside)}</svg>"
    )


def sparkline(lines: Sequence[Line]) -> str:
    """A small drawing of lines without axes; empty if no line has two points."""
    lines = [line for line in lines if len([point for point in line.points if math.isfinite(point.y)]) > 1]
    if not lines:
        return ""
    points = [point for line in lines for point in line.points if math.isfinite(point.y)]
    low, high = min(point.y for point in points), max(point.y for point in points)
    right = max(point.x for point in points) or 1.0
    drawn = "".join(
        f'<polyline class="line s{line.number % SERIES}" points="'
        + " ".join(
            f"{2 + point.x / right * (_SPARK_WIDTH - 4):.1f},"
            f"{2 + (high - point.y) / (high - low or 1) * (_SPARK_HEIGHT - 4):.1f}"
            for point in line.points
            if math.isfinite(point.y)
        )
        + '"/>'
        for line in lines
    )
    return f'<svg class="spark" viewBox="0 0 {_SPARK_WIDTH} {_SPARK_HEIGHT}" aria-hidden="true">{drawn}</svg>'


def draw_interval(value: float, interval: tuple[float, float], values: Sequence[float], name: str) -> str:
    """One value with its interval, drawn on the scale of `values`, and in digits beside it."""
    low, high = min(0.0, *values), max(0.0, *values)
    wide, tall, edge = 160, 20, 6

    def across(at: float) -> float:
        return edge + (at - low) / ((high - low) or 1) * (wide - 2 * edge)

    digits = f"{value:+.2f} ({interval[0]:+.2f} to {interval[1]:+.2f})".replace("-", "\N{MINUS SIGN}")
    return (
        f'<svg class="interval" viewBox="0 0 {wide} {tall}" role="img" aria-label={quoteattr(f"{name}: {digits}")}>'
        f'<line class="base" x1="{across(0):.1f}" x2="{across(0):.1f}" y1="1" y2="{tall - 1}"/>'
        f'<line class="range" x1="{across(interval[0]):.1f}" x2="{across(interval[1]):.1f}" y1="10" y2="10"/>'
        f'<circle cx="{across(value):.1f}" cy="10" r="4"/></svg> <span class="digits">{escape(digits)}</span>'
    )


def bars(title: str, labels: Sequence[str], shares: Sequence[float]) -> str:
    """A histogram: a bar for each label, `shares` of the whole."""
    wide, high, floor = 36, 90, 110
    most = max(shares) or 1.0
    parts = []
    for at, (label, share) in enumerate(zip(labels, shares, strict=True)):
        tall = share / most * (high - 14)
        middle = at * wide + wide / 2
        parts.append(f'<rect x="{at * wide + 3}" y="{floor - 16 - tall:.1f}" width="{wide - 6}" height="{tall:.1f}"/>')
        parts.append(f'<text x="{middle}" y="{floor - 2}" text-anchor="middle">{escape(label)}</text>')
        if share >= 0.005:
            parts.append(f'<text x="{middle}" y="{floor - 20 - tall:.1f}" text-anchor="middle">{share:.0%}</text>')
    return (
        f'<svg class="bars" viewBox="0 0 {wide * len(labels)} {floor}" role="img" aria-label={quoteattr(title)}>'
        f"{''.join(parts)}</svg>"
    )


@cache
def style() -> str:
    """The style sheet of all charts."""
    return (files("pairtune.report") / "static" / "charts.css").read_text(encoding="utf-8")


def standalone(svg: str) -> str:
    """A chart as a file of its own, in the colours of a light page."""
    light = re.sub(r"light-dark\(([^,]+), [^)]+\)", r"\1", style())
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(
        "<desc>", f"<style>{light}</style><desc>", 1
    )


@dataclass(frozen=True)
class _Frame:
    """The axes, and where values lie in the drawing."""

    across: Axis
    up: Axis
    left: float

    def place(self, x: float, y: float) -> tuple[float, float]:
        inside = min(max(self.up.share(y), 0.0), 1.0)
        return (
            round(self.left + self.across.share(x) * (_WIDTH - _RIGHT - self.left), 1),
            round(_HEIGHT - _BOTTOM - inside * (_HEIGHT - _BOTTOM - _TOP), 1),
        )

    def drawn(self) -> list[str]:
        right, floor = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
        parts = []
        for tick, label in zip(self.up.ticks, self.up.labels, strict=True):
            y = self.place(self.across.low, tick)[1]
            parts.append(f'<path class="grid" d="M{self.left:.1f} {y}H{right}"/>')
            parts.append(f'<text x="{self.left - 6:.1f}" y="{y}" dy=".35em" text-anchor="end">{label}</text>')
        parts.append(f'<path class="axis" d="M{self.left:.1f} {_TOP}V{floor}H{right}"/>')
        for tick, label in zip(self.across.ticks, self.across.labels, strict=True):
            x = self.place(tick, self.up.low)[0]
            parts.append(f'<path class="axis" d="M{x} {floor}v4"/>')
            parts.append(f'<text x="{x}" y="{floor + 16}" text-anchor="middle">{label}</text>')
        middle = (self.left + right) / 2
        return [*parts, f'<text x="{middle:.1f}" y="{_HEIGHT - 4}" text-anchor="middle">epoch</text>']


def _epochs(most: float) -> Axis:
    """An axis of whole epochs from 0."""
    last = max(1, math.ceil(most - 1e-6))
    step = max(1, math.ceil(last / 6))
    return Axis(0.0, float(last), tuple(float(tick) for tick in range(0, last + 1, step)))


def _base(chart: Chart, frame: _Frame) -> list[str]:
    if chart.base is None:
        return []
    y = frame.place(0, chart.base)[1]
    above = y - 4 if y > _TOP + 14 else y + 12
    return [
        f'<path class="base" d="M{frame.left:.1f} {y}H{_WIDTH - _RIGHT}"/>',
        f'<text x="{_WIDTH - _RIGHT}" y="{above:.1f}" text-anchor="end">{escape(chart.base_label)}</text>',
    ]


def _bands(line: Line, frame: _Frame) -> list[str]:
    """The intervals: an area where there are several, a bar where there is one."""
    known = [(point.x, *point.interval) for point in line.points if point.interval and math.isfinite(point.y)]
    colour = f"s{line.number % SERIES}"
    if len(known) == 1:
        ((x, low, high),) = known
        (at, foot), (_, head) = frame.place(x, low), frame.place(x, high)
        return [f'<path class="whisker {colour}" d="M{at - 4:.1f} {foot}h8M{at} {foot}V{head}M{at - 4:.1f} {head}h8"/>']
    if not known:
        return []
    corners = [frame.place(x, high) for x, _, high in known] + [frame.place(x, low) for x, low, _ in reversed(known)]
    return [f'<path class="band {colour}" d="M{"L".join(f"{x} {y}" for x, y in corners)}Z"/>']


def _line(line: Line, frame: _Frame, marked: bool) -> list[str]:
    points = [point for point in line.points if math.isfinite(point.y)]
    if not points:
        return []
    colour = f"s{line.number % SERIES}"
    path = " ".join("{},{}".format(*frame.place(point.x, point.y)) for point in points)
    winner = " winner" if line.winner else ""
    parts = [f'<polyline class="line {colour}{winner}" points="{path}"/>']
    for point in points if marked else ():
        x, y = frame.place(point.x, point.y)
        said = f"{line.label}, {_when(point.x)}: {_value(point)}"
        mark = (
            f'<g class="point" transform="translate({x} {y})"><title>{escape(said)}</title>'
            f'<circle class="reach" r="9"/><path class="mark {colour}" d="{_MARKS[line.number % SERIES]}"/></g>'
        )
        # Out of the tab order: tables lead to the same places, and a page may have a hundred points.
        link = point.link and f'<a href={quoteattr(point.link)} tabindex="-1" aria-label={quoteattr(said)}>{mark}</a>'
        parts.append(link or mark)
    return parts


def _when(x: float) -> str:
    return "base" if x == 0 else f"epoch {x:g}"


def _value(point: Point) -> str:
    return f"{point.y:.4g}" + ("" if point.interval is None else " [{:.4g}, {:.4g}]".format(*point.interval))


def _described(chart: Chart) -> str:
    lines = [
        f"{line.label}: " + ", ".join(f"{point.y:.3g}" for point in line.points[-6:])
        for line in chart.lines
        if line.points
    ]
    return "; ".join(lines)


def _number(value: float, step: float) -> str:
    """A tick's label: as many decimals as the step needs; a power of ten only for very small or very large steps."""
    if abs(value) < step * 1e-6:
        return "0"
    power = math.floor(math.log10(step) + 1e-9)
    if 1e-4 <= step < 1e6:
        return f"{value:,.{max(0, -power)}f}".replace("-", "\N{MINUS SIGN}")
    decimals = max(0, math.floor(math.log10(abs(value)) + 1e-9) - power)
    digits, exponent = f"{value:.{decimals}e}".split("e")
    if decimals:
        digits = digits.rstrip("0").rstrip(".")
    return digits.replace("-", "\N{MINUS SIGN}") + f"e{int(exponent)}"
