"""The live view, with and without a terminal."""

from __future__ import annotations

import io

from rich.console import Console

from pairtune.runs import RunFolder
from pairtune.track.live import LiveView, _clock
from pairtune.track.sinks import JsonlSink, Sinks

STEP = {"step": 1, "epoch": 0.5, "loss": 0.6931, "rewards/accuracies": 0.25}
EVALUATION = {"step": 2, "epoch": 1, "loss": 0.6, "eval_loss": 0.5, "eval_rewards/accuracies": 0.75}


def follow(console):
    with LiveView(["one", "two"], console) as live:
        live.start("one", 2)
        live.busy("one", "reference log-probs", 3, 8)
        live.log("one", STEP)
        live.log("one", EVALUATION)
        live.finish("one", "finished", 1)
        live.start("two", 2)
        live.log("two", STEP)
        live.finish("two", "failed", None)


def test_without_a_terminal_each_evaluation_is_a_line_with_the_time_left():
    out = io.StringIO()
    follow(Console(file=out))
    (line,) = out.getvalue().splitlines()
    assert line.startswith("one  epoch 1: loss 0.6000, eval_loss 0.5000, eval accuracy 0.750  (2/4 steps of the grid, ")


def test_long_work_says_where_it_is_now_and_then(monkeypatch):
    out = io.StringIO()
    clock = iter([0.0, 0.0, 0.0, 20.0, 40.0, 50.0, 80.0, 90.0])
    monkeypatch.setattr("pairtune.track.live.time.monotonic", lambda: next(clock, 90.0))
    with LiveView(["one"], Console(file=out)) as live:
        live.start("one", 2)
        for done in range(10, 60, 10):
            live.busy("one", "reference log-probs", done, 60)
    assert all(line.startswith("one  reference log-probs: ") for line in out.getvalue().splitlines())
    assert 1 <= len(out.getvalue().splitlines()) <= 2


def test_on_a_terminal_each_trial_has_its_line():
    out = io.StringIO()
    follow(Console(file=out, force_terminal=True, width=120, color_system=None))
    screen = out.getvalue()
    assert "waiting" in screen or "loss 0.6931" in screen
    assert "best epoch 1" in screen
    assert "failed" in screen
    assert "whole grid" in screen


def test_times():
    assert [_clock(seconds) for seconds in (0, 59.6, 3600, 3725)] == ["0:00", "1:00", "1:00:00", "1:02:05"]


def test_every_record_is_a_line_of_the_trials_file_and_every_sink_is_told(tmp_path):
    told = []

    class Listener:
        def start(self, *event):
            told.append(("start", *event))

        def log(self, *event):
            told.append(("log", *event))

        def finish(self, *event):
            told.append(("finish", *event))

    sinks = Sinks([JsonlSink(RunFolder(tmp_path)), Listener()])
    sinks.start("one", 2)
    sinks.log("one", {"step": 1, "loss": 0.5})
    sinks.log("one", {"step": 2, "loss": float("nan")})
    sinks.finish("one", "finished", 1)
    assert (
        tmp_path / "trials" / "one" / "metrics.jsonl"
    ).read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": NaN}\n'
    assert [event[0] for event in told] == ["start", "log", "log", "finish"]
