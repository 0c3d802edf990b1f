"""The live view: a progress bar per trial on a terminal, otherwise a line per evaluation."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from pairtune.run.metrics import Evaluation, TrainingStep
from pairtune.screen import screen
from pairtune.track.sinks import Sink
from pairtune.track.time_left import TimeLeft

# Interval of progress lines without a terminal.
QUIET_SECONDS = 30


class LiveView(Sink):
    """Shows the progress of all trials of a sweep; a context manager that restores the terminal at the end.

    Args:
        trials: number of steps of each trial known so far, by name, in grid order.
        count: number of trials in all.
        left: the estimate of the time left; it must receive events before this sink does.
        console: the console to write to; stderr by default.
    """

    def __init__(self, trials: Mapping[str, int], count: int, left: TimeLeft, console: Console | None = None) -> None:
        self._count, self._estimate = count, left
        self._console = console or screen(stderr=True)
        self._totals: dict[str, int] = {}
        self._steps: dict[str, int] = {}
        self._printed = time.monotonic()
        self._busy = ("", 0, 0.0)  # current work besides steps, units done, and start time
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}", style="cyan"),
            TextColumn("{task.fields[state]}"),
            console=self._console,
            refresh_per_second=2,
            disable=not self._console.is_terminal,
        )
        self._all = self._progress.add_task("all trials", total=None, state="", left="")
        self._tasks: dict[str, TaskID] = {}
        for name, steps in trials.items():
            self._add(name, steps)

    def __enter__(self) -> LiveView:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def start(self, trial: str, total_steps: int, steps: int, lines: int) -> None:
        if trial not in self._tasks:
            self._add(trial, total_steps)
        self._totals[trial] = total_steps
        self._advance(trial, steps, "preparing")

    def log(self, trial: str, line: TrainingStep | Evaluation) -> None:
        if isinstance(line, Evaluation):
            self._log_evaluation(trial, line)
            return
        shown = "" if line.accuracy is None else f"  accuracy {line.accuracy:.2f}"
        self._advance(trial, line.step, f"epoch {line.epoch:.1f}  loss {line.loss:.4f}{shown}")
        if self._quiet_for_long():
            self._console.print(f"{self._position()}, {self._left()} left", highlight=False, soft_wrap=True)

    def on_progress(self, trials: Sequence[str], what: str, done: int, total: int) -> None:
        for trial in trials:
            self._progress.update(self._tasks[trial], state=f"{what} {done:,}/{total:,}")
        before, so_far, since = self._busy
        if before != what or done <= so_far:  # new work, or the same work again
            since = time.monotonic()
        self._busy = (what, done, since)
        if self._quiet_for_long() and done < total:
            left = clock((time.monotonic() - since) / done * (total - done))
            self._console.print(f"{what}: {done:,}/{total:,}, {left} left", highlight=False, soft_wrap=True)

    def notice(self, text: str) -> None:
        self._console.print(text, style="yellow", highlight=False, soft_wrap=True)

    def finish(self, trial: str, status: str, best_epoch: int | None) -> None:
        self._totals[trial] = self._steps[trial]  # a trial that ended early makes no further steps
        best = f"best epoch {best_epoch}"
        self._advance(trial, self._steps[trial], best if status == "finished" else f"[red]{status}[/red]")

    def _advance(self, trial: str, steps: int, state: str) -> None:
        self._steps[trial] = steps
        self._progress.update(self._tasks[trial], completed=steps, total=self._totals[trial], state=state)
        done, total = self._steps_done()
        self._progress.update(self._all, completed=done, total=total, left=f"{self._left()} left")

    def _log_evaluation(self, trial: str, evaluation: Evaluation) -> None:
        text = (
            f"{trial}  epoch {evaluation.epoch}: loss {evaluation.loss:.4f}, eval_loss {evaluation.eval_loss:.4f}, "
            f"eval accuracy {evaluation.accuracy:.3f}"
        )
        if not self._console.is_terminal:
            text += f"  ({self._position()}, {self._left()} left)"
            self._printed = time.monotonic()
        self._console.print(text, highlight=False, soft_wrap=True)

    def _add(self, trial: str, steps: int) -> None:
        self._totals[trial], self._steps[trial] = steps, 0
        self._tasks[trial] = self._progress.add_task(trial, total=steps, state="waiting", left="")

    def _steps_done(self) -> tuple[int, int]:
        """Steps made and steps in all; trials not known yet are assumed to have the mean number of steps."""
        known = sum(self._totals.values())
        return sum(self._steps.values()), known * max(self._count, len(self._totals)) // max(1, len(self._totals))

    def _position(self) -> str:
        done, total = self._steps_done()
        return f"{done}/{total} steps of all trials"

    def _left(self) -> str:
        seconds = self._estimate.seconds()
        return "?" if seconds is None else clock(seconds)

    def _quiet_for_long(self) -> bool:
        """Whether the next progress line is due, without a terminal."""
        now = time.monotonic()
        if self._console.is_terminal or now - self._printed < QUIET_SECONDS:
            return False
        self._printed = now
        return True


def clock(seconds: float) -> str:
    """A duration as `m:ss`, or `h:mm:ss` from one hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
