"""A run's curves as SVG, in colours that colour-blind readers can tell apart, for light and dark pages."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pairtune.report.report_data import ReportData
from pairtune.report.series import SERIES, Points, Series

# Okabe and Ito's palette without yellow, which is too faint on white; trials also differ in their markers.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_MARKERS = "osD^vPX*"
# Placeholder that is replaced by the page's text colour.
_INK = "#010203"


def draw_curves(gathered: ReportData) -> dict[str, str]:
    """All curves that a run's records allow.

    Returns:
        SVG elements by a short name (`loss`, `accuracy`, …), each with a title and a description for screen readers.
    """
    return {
        series.name: _draw(gathered, series)
        for series in SERIES
        if any(series.points(trial) for trial in gathered.trials)
    }


def legend(gathered: ReportData) -> list[tuple[str, str, str]]:
    """Names, labels and colours of the trials, in grid order."""
    return [(trial.name, trial.label, colour(number)) for number, trial in enumerate(gathered.trials)]


def colour(number: int) -> str:
    """The colour of the trial with this number."""
    return COLOURS[number % len(COLOURS)]


def standalone(svg: str) -> str:
    """A curve as a standalone file, with dark ink."""
    return svg.replace("currentColor", "#444444").replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


def _draw(gathered: ReportData, series: Series) -> str:
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": series.name, "font.family": "sans-serif"}):
        figure = Figure(figsize=(4.2, 2.7), layout="constrained")
        axes = figure.subplots()
        if series.base_level is not None:
            axes.axhline(series.base_level, color=_INK, linewidth=0.8, linestyle=(0, (1, 3)))
        for number, trial in enumerate(gathered.trials):
            _line(axes, number, series.points(trial), winner=trial.name == gathered.selection.winner)
        _style(axes, series.title, max(record.trial.epochs for record in gathered.records.values()))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), series.title, "; ".join(_described(gathered, series)))


def _line(axes: Axes, number: int, points: Points, *, winner: bool) -> None:
    axes.plot(
        [x for x, _ in points],
        [y for _, y in points],
        color=colour(number),
        linewidth=2.6 if winner else 1.3,
        marker=_MARKERS[number % len(_MARKERS)],
        markersize=5 if winner else 4,
    )


def _style(axes: Axes, title: str, epochs: int) -> None:
    axes.set_title(title, color=_INK, fontsize=11, loc="left")
    axes.set_xlabel("epoch", color=_INK, fontsize=9)
    axes.set_xlim(left=0, right=epochs + 0.1)
    axes.set_xticks(range(0, epochs + 1, max(1, epochs // 6)))
    axes.tick_params(colors=_INK, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_INK)
    axes.grid(axis="y", color=_INK, alpha=0.12)


def _described(gathered: ReportData, series: Series) -> Iterator[str]:
    for trial in gathered.trials:
        if points := series.points(trial):
            yield f"{trial.label}: " + ", ".join(f"{value:.3g}" for _, value in points[-6:])


def _inline(svg: str, title: str, description: str) -> str:
    """An SVG element for an HTML page: no XML header, the page's text colour, a description for screen readers."""
    body = svg[svg.index("<svg") :]
    size = re.search(r'viewBox="([^"]*)"', body)
    inner = body[body.index(">") + 1 :]
    escaped = {"title": title, "desc": description}
    words = "".join(f"<{tag}>{_escape(text)}</{tag}>" for tag, text in escaped.items())
    links = 'xmlns:xlink="http://www.w3.org/1999/xlink"'
    box = size.group(1) if size else "0 0 302 194"
    return f'<svg viewBox="{box}" role="img" {links}>{words}{inner.strip()}'.replace(_INK, "currentColor")


def _escape(text: Any) -> str:
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
