"""The live view, with and without a terminal."""

from __future__ import annotations

import io
import json
import os
from contextlib import contextmanager

import pytest
from conftest import evaluation
from rich.console import Console

from pairtune.run.folder import Run
from pairtune.run.metrics import TrainingStep
from pairtune.track.live_view import LiveView
from pairtune.track.live_view import clock as clock_of
from pairtune.track.sinks import JsonlSink, Sinks
from pairtune.track.time_left import ProgressSink, TimeLeft, forget_process

STEP = TrainingStep(step=1, epoch=0.5, loss=0.6931, accuracy=0.25)
EVALUATION = evaluation(step=2, epoch=1, loss=0.6, eval_loss=0.5, accuracy=0.75)


def at_step(step):
    return STEP.model_copy(update={"step": step})


@contextmanager
def viewing(trials, count, console):
    """The live view with the estimate that it shows, as one sink."""
    left = TimeLeft(trials, dict.fromkeys(trials, 1), count, evaluation_steps=0)
    with LiveView(trials, count, left, console) as live:
        yield Sinks([left, live])


def follow(console):
    with viewing({"one": 2, "two": 2}, 2, console) as live:
        live.start("one", 2, 0, 0)
        live.on_progress(["one"], "reference log-probs", 3, 8)
        live.log("one", STEP)
        live.log("one", at_step(2))
        live.log("one", EVALUATION)
        live.finish("one", "finished", 1)
        live.start("two", 2, 0, 0)
        live.log("two", STEP)
        live.finish("two", "failed", None)


def test_without_a_terminal_each_evaluation_is_a_line_with_the_time_left():
    out = io.StringIO()
    follow(Console(file=out))
    (line,) = out.getvalue().splitlines()
    assert line.startswith(
        "one  epoch 1: loss 0.6000, eval_loss 0.5000, eval accuracy 0.750  (2/4 steps of all trials, "
    )


class Clock:
    """A clock that advances on command."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("pairtune.track.live_view.time.monotonic", lambda: self.now)


def test_long_work_says_where_it_is_now_and_then(monkeypatch):
    out, clock = io.StringIO(), Clock(monkeypatch)
    with viewing({"one": 2, "two": 2}, 2, Console(file=out)) as live:
        live.start("one", 2, 0, 0)
        live.start("two", 2, 0, 0)
        for done in range(10, 61, 10):
            live.on_progress(["one", "two"], "reference log-probs", done, 60)
            clock.now += 20
    assert out.getvalue().splitlines() == [
        "reference log-probs: 30/60, 0:40 left",
        "reference log-probs: 50/60, 0:16 left",
    ]


def test_the_time_left_of_an_evaluation_does_not_count_the_time_since_the_one_before(monkeypatch):
    out, clock = io.StringIO(), Clock(monkeypatch)
    with viewing({"one": 2}, 1, Console(file=out)) as live:
        live.start("one", 2, 0, 0)
        live.on_progress(["one"], "evaluating", 2, 60)
        live.on_progress(["one"], "evaluating", 60, 60)
        clock.now += 1000
        live.on_progress(["one"], "evaluating", 2, 60)
        clock.now += 40
        live.on_progress(["one"], "evaluating", 20, 60)
    assert out.getvalue().splitlines()[-1] == "evaluating: 20/60, 1:20 left"


def test_time_left_counts_all_trials_and_not_the_steps_of_an_earlier_call(monkeypatch):
    out, clock = io.StringIO(), Clock(monkeypatch)
    with viewing({"one": 10, "two": 10, "later": 20}, 3, Console(file=out)) as live:
        live.start("one", 10, 5, 0)
        live.start("two", 10, 5, 0)
        for step in range(6, 11):
            clock.now += 20
            for name in ("one", "two"):
                live.log(name, at_step(step))
    # Without each trial's first step, 5 steps took 60 s; 23 are left; what follows takes 12 % of the training.
    assert clock_of(23 * 12 * 1.12 + 0.12 * 60) == "5:16"
    assert out.getvalue().splitlines()[-1] == "17/40 steps of all trials, 5:16 left"


def test_the_time_left_holds(monkeypatch, tmp_path):
    """Steps of 2 s, evaluations of 30 s, and a first step that waits for a minute of preparation."""
    now = Clock(monkeypatch)
    run = Run(tmp_path)
    left = TimeLeft({"one": 60}, {"one": 3}, 1, evaluation_steps=40)
    sinks = Sinks([left, ProgressSink(run, left)])
    training = 60 * 2 + 3 * 30
    sinks.start("one", 60, 0, 0)
    now.now += 60
    over = 0
    for step in range(1, 61):
        now.now += 2
        over += 2
        sinks.log("one", at_step(step))
        if step >= 2:
            truth = (training - over) * 1.12 + 0.12 * over
            assert left.seconds() == pytest.approx(truth, rel=0.12), step
        if step % 20 == 0:
            sinks.on_progress(["one"], "evaluating", 1, 2)
            now.now += 30
            over += 30
            sinks.log("one", evaluation(step=step, epoch=step // 20, loss=0.6, eval_loss=0.5))
    left.finish("one", "finished", 3)
    assert left.seconds() == pytest.approx(0.12 * over, rel=0.12)
    progress = run.progress
    assert progress.stage == "training"
    assert progress.pid == os.getpid()
    forget_process(run)
    assert (run.progress.pid, run.progress.seconds_left) == (0, None)


def test_the_time_left_starts_from_the_estimate(monkeypatch):
    """60 steps estimated at 4 s and three evaluations at 20 s, which take 2 s and 30 s."""
    now = Clock(monkeypatch)
    left = TimeLeft({"one": 60}, {"one": 3}, 1, evaluation_steps=40, expected=(4.0, 20.0))
    assert left.seconds() == pytest.approx(1.12 * (60 * 4 + 3 * 20))
    left.start("one", 60, 0, 0)
    for step in range(1, 21):
        now.now += 2
        left.log("one", at_step(step))
    # The estimate counts as three steps and one evaluation; the first step does not count.
    step = (19 * 2 + 3 * 4) / 22
    assert left.seconds() == pytest.approx(1.12 * (40 * step + 3 * 20) + 0.12 * 19 * 2)
    now.now += 30
    left.log("one", evaluation(step=20, epoch=1, loss=0.6, eval_loss=0.5))
    assert left.seconds() == pytest.approx(1.12 * (40 * step + 2 * 25) + 0.12 * (19 * 2 + 30))


def test_on_a_terminal_each_trial_has_its_line():
    out = io.StringIO()
    follow(Console(file=out, force_terminal=True, width=120, color_system=None))
    screen = out.getvalue()
    assert "waiting" in screen or "loss 0.6931" in screen
    assert "best epoch 1" in screen
    assert "failed" in screen
    assert "all trials" in screen


def test_times():
    assert [clock_of(seconds) for seconds in (0, 59.6, 3600, 3725)] == ["0:00", "1:00", "1:00:00", "1:02:05"]


def test_every_record_is_a_line_of_the_trials_file_and_every_sink_is_told(tmp_path):
    told = []

    class Listener:
        def start(self, *event):
            told.append(("start", *event))

        def log(self, *event):
            told.append(("log", *event))

        def finish(self, *event):
            told.append(("finish", *event))

    sinks = Sinks([JsonlSink(Run(tmp_path)), Listener()])
    sinks.start("one", 2, 0, 0)
    sinks.log("one", TrainingStep(step=1, epoch=0.5, loss=0.5))
    sinks.log("one", TrainingStep(step=2, epoch=1, loss=float("nan")))
    sinks.finish("one", "finished", 1)
    assert (
        tmp_path / "trials" / "one" / "metrics.jsonl"
    ).read_text() == '{"step": 1, "epoch": 0.5, "loss": 0.5}\n{"step": 2, "epoch": 1.0, "loss": NaN}\n'
    assert [event[0] for event in told] == ["start", "log", "log", "finish"]


def test_a_trial_that_goes_on_forgets_the_lines_of_steps_that_it_will_make_again(tmp_path):
    file = tmp_path / "trials" / "one" / "metrics.jsonl"
    sink = JsonlSink(Run(tmp_path))
    sink.start("one", 4, 0, 0)
    for step in (1, 2, 3):
        sink.log("one", at_step(step))
    with file.open("a") as cut_off:
        cut_off.write('{"step": 4, "lo')
    sink.start("one", 4, 2, 2)
    sink.log("one", at_step(3))
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3]
