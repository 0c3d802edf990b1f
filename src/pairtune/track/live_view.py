"""The live view: one line per trial on a terminal, one line per evaluation where there is none."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from pairtune.run.metrics import Evaluation, TrainingStep

# Where there is no terminal, long work says where it is this often.
_QUIET_SECONDS = 30


class LiveView:
    """Follows all trials of a grid; a context manager, so that the terminal is left as it was found.

    Progress is written to stderr.

    Args:
        trials: the steps that each trial will make, by name, in the order of the grid, of those that are known.
        count: how many there will be in all.
        console: where to write.
    """

    def __init__(self, trials: Mapping[str, int], count: int, console: Console | None = None) -> None:
        self._count = count
        self._console = console or Console(stderr=True)
        self._totals: dict[str, int] = {}
        self._steps: dict[str, int] = {}
        self._found: dict[str, int] = {}  # steps of earlier calls, which took none of this one's time
        self._started = self._spoken = time.monotonic()
        self._busy = ("", 0, 0.0)  # what is done besides steps, how far it is, and since when
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
        self._totals[trial], self._found[trial] = total_steps, steps
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
        if before != what or done <= so_far:  # it begins, perhaps again
            since = time.monotonic()
        self._busy = (what, done, since)
        if self._quiet_for_long() and done < total:
            left = clock((time.monotonic() - since) / done * (total - done))
            self._console.print(f"{what}: {done:,}/{total:,}, {left} left", highlight=False, soft_wrap=True)

    def finish(self, trial: str, status: str, best_epoch: int | None) -> None:
        self._totals[trial] = self._steps[trial]  # a trial that ended early makes no more
        best = f"best epoch {best_epoch}"
        self._advance(trial, self._steps[trial], best if status == "finished" else f"[red]{status}[/red]")

    def _advance(self, trial: str, steps: int, state: str) -> None:
        self._steps[trial] = steps
        self._progress.update(self._tasks[trial], completed=steps, total=self._totals[trial], state=state)
        done, total = self._how_far()
        self._progress.update(self._all, completed=done, total=total, left=f"{self._left()} left")

    def _log_evaluation(self, trial: str, evaluation: Evaluation) -> None:
        said = (
            f"{trial}  epoch {evaluation.epoch}: loss {evaluation.loss:.4f}, eval_loss {evaluation.eval_loss:.4f}, "
            f"eval accuracy {evaluation.accuracy:.3f}"
        )
        if not self._console.is_terminal:
            said += f"  ({self._position()}, {self._left()} left)"
            self._spoken = time.monotonic()
        self._console.print(said, highlight=False, soft_wrap=True)

    def _add(self, trial: str, steps: int) -> None:
        self._totals[trial], self._steps[trial], self._found[trial] = steps, 0, 0
        self._tasks[trial] = self._progress.add_task(trial, total=steps, state="waiting", left="")

    def _how_far(self) -> tuple[int, int]:
        """Steps made and steps in all; trials that are not known yet are taken to be like the others."""
        known = sum(self._totals.values())
        return sum(self._steps.values()), known * max(self._count, len(self._totals)) // max(1, len(self._totals))

    def _position(self) -> str:
        done, total = self._how_far()
        return f"{done}/{total} steps of all trials"

    def _left(self) -> str:
        """Time left at the mean speed so far, pauses for evaluations included."""
        done, total = self._how_far()
        here = done - sum(self._found.values())
        return clock((time.monotonic() - self._started) / here * (total - done)) if here > 0 else "?"

    def _quiet_for_long(self) -> bool:
        """Whether it is time to say something again where there is no terminal."""
        now = time.monotonic()
        if self._console.is_terminal or now - self._spoken < _QUIET_SECONDS:
            return False
        self._spoken = now
        return True


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are some."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
