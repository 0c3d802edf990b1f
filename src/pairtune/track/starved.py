"""Detects that a run waits for CPUs that other programs use, and reports it once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pairtune.run.metrics import Evaluation, TrainingStep
from pairtune.track.sinks import Sink

# Measurement interval in seconds, and the share of waiting above which it is reported.
_SECONDS, STARVED = 15.0, 0.25
_TASKS = Path("/proc/self/task")


class CpuWait:
    """Measures how long this process's threads waited for a CPU, on Linux; elsewhere they never seem to.

    Args:
        tasks: folder of the threads' run and wait times (proc(5), `schedstat`).
    """

    def __init__(self, tasks: Path = _TASKS) -> None:
        self._tasks = tasks
        self._before = self._read()

    def share(self) -> float:
        """The share of their time that the threads waited since this was asked last, or since the beginning."""
        now = self._read()
        both = [(now[task], self._before.get(task, (0, 0))) for task in now]
        ran, waited = (sum(after[at] - before[at] for after, before in both) for at in (0, 1))
        self._before = now
        return waited / (ran + waited) if waited > 0 else 0.0

    def _read(self) -> dict[str, tuple[int, int]]:
        """Nanoseconds that each thread has run and has waited to run."""
        found = {}
        for task in self._tasks.glob("*/schedstat"):
            try:
                ran, waited, *_ = task.read_text(encoding="ascii").split()
                found[task.parent.name] = int(ran), int(waited)
            except (OSError, ValueError):
                continue  # a thread that has just ended
        return found


class StarvedSink(Sink):
    """Reports once if a run waits long for CPUs that other programs use.

    Args:
        say: called once, with one line.
        tasks: see `CpuWait`.
    """

    def __init__(self, say: Callable[[str], None], tasks: Path = _TASKS) -> None:
        self._say, self._wait = say, CpuWait(tasks)
        self._since, self._reported = time.monotonic(), False

    def start(self, trial: str, total_steps: int, steps: int, lines: int) -> None:
        """Do nothing: a start takes no time."""

    def log(self, trial: str, line: TrainingStep | Evaluation) -> None:
        """Measure again if the interval has passed."""
        self._look_if_due()

    def on_progress(self, trials: Sequence[str], what: str, done: int, total: int) -> None:
        """Measure again if the interval has passed: evaluations take time too."""
        self._look_if_due()

    def _look_if_due(self) -> None:
        if not self._reported and time.monotonic() - self._since >= _SECONDS:
            self.look()

    def look(self) -> None:
        """Measure the wait since the last measurement, and report it if it is large."""
        self._since, share = time.monotonic(), self._wait.share()
        if share > STARVED:
            self._reported = True
            self._say(
                f"other programs use this machine's CPUs: the run waited for one {share:.0%} of the "
                "time; stop them, or interrupt and resume the run, whose threads then wait without spinning"
            )
