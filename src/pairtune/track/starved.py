"""Notices that a run waits for processors that others use, and says so once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pairtune.run.metrics import Evaluation, TrainingStep

# Seconds over which waiting is measured, and the share of it from which it is said.
_SECONDS, _SHARE = 15.0, 0.25


class StarvedSink:
    """Measures how long this process's threads stood in line for a processor (Linux; elsewhere it says nothing).

    Args:
        say: told in one line, once.
        tasks: where the system keeps what each thread has run and waited (proc(5), `schedstat`).
    """

    def __init__(self, say: Callable[[str], None], tasks: Path = Path("/proc/self/task")) -> None:
        self._say, self._tasks = say, tasks
        self._before, self._since, self._said = self._read(), time.monotonic(), False

    def start(self, trial: str, total_steps: int, steps: int, lines: int) -> None:
        """Nothing: only steps take time."""

    def log(self, trial: str, line: TrainingStep | Evaluation) -> None:
        """Look again, where enough time has passed since the last look."""
        self._look_again()

    def on_progress(self, trials: Sequence[str], what: str, done: int, total: int) -> None:
        """The same: evaluations take time too."""
        self._look_again()

    def finish(self, trial: str, status: str, best_epoch: int | None) -> None:
        """Nothing is left to say."""

    def _look_again(self) -> None:
        if not self._said and time.monotonic() - self._since >= _SECONDS:
            self.look()

    def look(self) -> None:
        """Compare with the last look."""
        now = self._read()
        both = [(now[task], self._before.get(task, (0, 0))) for task in now]
        ran, waited = (sum(after[at] - before[at] for after, before in both) for at in (0, 1))
        self._before, self._since = now, time.monotonic()
        if waited > _SHARE * (ran + waited) > 0:
            self._said = True
            self._say(
                f"other programs use this machine's processors: the run waited for one {waited / (ran + waited):.0%} "
                "of the time; it ends sooner alone; stopped and resumed, its threads wait without spinning"
            )

    def _read(self) -> dict[str, tuple[int, int]]:
        """Nanoseconds that each thread has run, and has waited to run."""
        found = {}
        for task in self._tasks.glob("*/schedstat"):
            try:
                ran, waited, *_ = task.read_text(encoding="ascii").split()
                found[task.parent.name] = int(ran), int(waited)
            except (OSError, ValueError):
                continue  # a thread that has just ended
        return found
