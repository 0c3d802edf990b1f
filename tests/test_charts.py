"""Charts: axes that people expect, points where they belong, and nothing that a browser would run."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pairtune.report.charts import Chart, Line, Point, bars, draw, nice_axis, sparkline, standalone

numbers = st.floats(-1e6, 1e6, allow_nan=False)


@given(numbers, numbers)
@example(1e-05, 1e-05)
def test_an_axis_has_round_ticks_around_its_values(one, other):
    low, high = sorted((one, other))
    axis = nice_axis(low, high)
    room = 1e-6 * max(1.0, abs(low), abs(high))
    assert axis.low <= low + room
    assert axis.high >= high - room
    assert 2 <= len(axis.ticks) <= 8
    step = axis.ticks[1] - axis.ticks[0]
    assert any(
        math.isclose(step / 10 ** math.floor(math.log10(step * 1.0001)), round_, rel_tol=1e-6) for round_ in (1, 2, 5)
    )
    assert len(set(axis.labels)) == len(axis.labels)


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.1461, 0.6931, ["0", "0.2", "0.4", "0.6", "0.8"]),
        (0.0, 5.915, ["0", "2", "4", "6"]),
        (-53.6, 0.0, ["\u221260", "\u221240", "\u221220", "0"]),
        (1e-05, 1e-05, ["9e-6", "9.5e-6", "1e-5", "1.05e-5", "1.1e-5"]),
        (-3e6, 4e6, ["\u22124e6", "\u22122e6", "0", "2e6", "4e6"]),
        (3e-05, 9e-05, ["2e-5", "4e-5", "6e-5", "8e-5", "1e-4"]),
        (0.69312, 0.69315, ["0.60", "0.65", "0.70", "0.75", "0.80"]),
        (1200.0, 3900.0, ["1,000", "2,000", "3,000", "4,000"]),
    ],
)
def test_axes_by_hand(low, high, labels):
    assert nice_axis(low, high).labels == labels


def test_an_accuracy_never_passes_its_bounds():
    axis = nice_axis(0.62, 1.0, (0.0, 1.0))
    assert (axis.high, axis.labels[-1]) == (1.0, "1.0")
    assert nice_axis(0.0, 0.05, (0.0, 1.0)).low == 0.0


CHART = Chart(
    "Loss <of> a & b",
    [
        Line("lr 1, <b>", 0, [Point(0, 0.7), Point(1, 0.4, (0.3, 0.5), "/a?b=1&c=2"), Point(2, math.nan)], winner=True),
        Line("lr 2", 1, [Point(0, 0.7), Point(1, 0.5, (0.4, 0.6)), Point(2, 0.45, (0.35, 0.55))]),
    ],
    base=0.7,
)


def test_a_chart_is_well_formed_and_says_what_it_shows():
    svg = draw(CHART)
    root = ET.fromstring(svg)  # noqa: S314 - our own
    assert root.get("aria-label") == "Loss <of> a & b"
    assert "lr 2: 0.7, 0.5, 0.45" in root.find("desc").text
    assert [title.text for title in root.iter("title")][1] == "lr 1, <b>, epoch 1: 0.4 [0.3, 0.5]"
    assert [link.get("href") for link in root.iter("a")] == ["/a?b=1&c=2"]
    lines = [line.get("points").split() for line in root.iter("polyline")]
    assert [len(points) for points in lines] == [2, 3]  # NaN is not drawn
    assert len(root.findall("path[@class='band s1']")) == 1
    assert len(root.findall("path[@class='whisker s0']")) == 1  # one interval is a bar
    assert "style=" not in svg


def test_points_lie_where_the_axis_says():
    svg = draw(Chart("x", [Line("a", 0, [Point(0, 0.0), Point(1, 1.0), Point(2, 0.5)])]))
    ticks = {
        label: float(y) for y, label in re.findall(r'<text x="[\d.]+" y="([\d.]+)" dy=".35em"[^>]*>([\d.]+)<', svg)
    }
    (points,) = re.findall(r'points="([^"]+)"', svg)
    heights = [float(point.split(",")[1]) for point in points.split()]
    assert heights == [ticks["0"], ticks["1.0"], pytest.approx((ticks["0"] + ticks["1.0"]) / 2, abs=0.1)]


def test_nothing_to_draw_is_nothing():
    assert draw(Chart("x", [Line("a", 0, [Point(1, math.nan)])])) == ""
    assert sparkline([Line("a", 0, [Point(1, 1.0)])]) == ""


def test_small_drawings_and_files_are_well_formed():
    ET.fromstring(sparkline([Line("a", 7, [Point(0, 1.0), Point(1, 1.0)])]))  # noqa: S314 - our own
    ET.fromstring(bars("a <b>", ["1", "more"], [0.25, 0.75]))  # noqa: S314 - our own
    alone = standalone(draw(CHART))
    ET.fromstring(alone)  # noqa: S314 - our own
    assert "light-dark" not in alone
    assert "#0072b2" in alone
