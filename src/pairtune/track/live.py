"""The live view: one line per trial on a terminal, one line per evaluation where there is none."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

# Where there is no terminal, long work says where it is this often.
_QUIET_SECONDS = 30


class LiveView:
    """Follows all trials of a grid; a context manager, so that the terminal is left as it was found.

    Progress is written to stderr. `trials` are all trials in the order they will run.
    """

    def __init__(self, trials: Sequence[str], console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._names = list(trials)
        self._started = time.monotonic()
        self._totals: dict[str, int] = {}
        self._busy = ("", "", 0.0, 0.0)  # trial, what it does, since when, when that was last said
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _TimeLeft(),
            TextColumn("{task.fields[state]}"),
            console=self._console,
            refresh_per_second=2,
            disable=not self._console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {
            name: self._progress.add_task(name, total=None, start=False, state="waiting") for name in self._names
        }
        self._all = self._progress.add_task("whole grid", total=None, start=False, state="")

    def __enter__(self) -> LiveView:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def start(self, trial: str, total_steps: int) -> None:
        task = self._tasks[trial]
        self._progress.update(task, total=total_steps, state="preparing")
        self._progress.start_task(task)
        if not self._totals:
            self._progress.update(self._all, total=total_steps * len(self._names))
            self._progress.start_task(self._all)
        self._totals[trial] = total_steps

    def log(self, trial: str, record: dict[str, Any]) -> None:
        if "eval_loss" in record:
            self._log_evaluation(trial, record)
            return
        accuracy = record.get("rewards/accuracies")
        shown = "" if accuracy is None else f"  accuracy {accuracy:.2f}"
        state = f"epoch {record['epoch']:.1f}  loss {record['loss']:.4f}{shown}"
        self._progress.update(self._tasks[trial], completed=record["step"], state=state)
        done = sum(task.completed for task in self._progress.tasks if task.id != self._all)
        self._progress.update(self._all, completed=done)

    def busy(self, trial: str, what: str, done: int, total: int) -> None:
        self._progress.update(self._tasks[trial], state=f"{what} {done:,}/{total:,}")
        now = time.monotonic()
        if self._busy[:2] != (trial, what):
            self._busy = (trial, what, now, now)
        *_, started, spoken = self._busy
        if not self._console.is_terminal and now - spoken > _QUIET_SECONDS and done < total:
            self._busy = (trial, what, started, now)
            left = _clock((now - started) / done * (total - done))
            self._console.print(f"{trial}  {what}: {done:,}/{total:,}, {left} left", highlight=False, soft_wrap=True)

    def finish(self, trial: str, status: str, best_epoch: int | None) -> None:
        state = f"best epoch {best_epoch}" if status == "finished" else f"[red]{status}[/red]"
        self._progress.update(self._tasks[trial], state=state)
        self._progress.stop_task(self._tasks[trial])
        self._progress.update(self._all, completed=sum(self._totals.values()))

    def _log_evaluation(self, trial: str, record: dict[str, Any]) -> None:
        line = (
            f"{trial}  epoch {record['epoch']}: loss {record['loss']:.4f}, eval_loss {record['eval_loss']:.4f}, "
            f"eval accuracy {record['eval_rewards/accuracies']:.3f}"
        )
        if not self._console.is_terminal:
            done = sum(self._totals.values()) - self._totals[trial] + record["step"]
            total = self._totals[trial] * len(self._names)
            left = (time.monotonic() - self._started) / done * (total - done)
            line += f"  ({done}/{total} steps of the grid, {_clock(left)} left)"
        self._console.print(line, highlight=False, soft_wrap=True)


class _TimeLeft(ProgressColumn):
    """Time left at the mean speed so far; rich's own estimate forgets the pauses in which a trial is evaluated."""

    def render(self, task: Task) -> Text:
        if not task.total or not task.completed or task.elapsed is None:
            return Text("")
        if task.finished:
            return Text(f"{_clock(task.finished_time or 0)} taken", style="green")
        return Text(f"{_clock(task.elapsed / task.completed * (task.total - task.completed))} left", style="cyan")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
