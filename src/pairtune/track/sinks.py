"""The protocol of sinks, the JSONL sink that is always used, and several sinks as one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pairtune.files import sync, write_atomic
from pairtune.run.folder import Run
from pairtune.run.metrics import Evaluation, TrainingStep


class Sink:
    """Receives the progress and metrics of a sweep's trials; a sink overrides what it needs."""

    def start(self, trial: str, total_steps: int, steps: int, lines: int) -> None:
        """A trial starts or resumes.

        Args:
            trial: its name.
            total_steps: number of steps in all.
            steps: number of steps already made.
            lines: number of lines logged by then; lines after these belong to steps that will be repeated.
        """

    def log(self, trial: str, line: TrainingStep | Evaluation) -> None:
        """Receive the metrics of one step or one evaluation."""

    def flush(self) -> None:
        """Make what was logged so far survive a power cut: a checkpoint, or a trial's end, is about to say so."""

    def on_progress(self, trials: Sequence[str], what: str, done: int, total: int) -> None:
        """Trials make progress with work other than steps, such as an evaluation; `what` names it."""

    def notice(self, text: str) -> None:
        """Something happened that whoever watches should know."""

    def finish(self, trial: str, status: str, best_epoch: int | None) -> None:
        """A trial has ended; `status` is that of its record."""


class JsonlSink(Sink):
    """Appends each record to the trial's `metrics.jsonl`, one line per record, written at once."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._unsynced: set[Path] = set()

    def start(self, trial: str, total_steps: int, steps: int, lines: int) -> None:
        file = self._run.paths.trial(trial).metrics
        kept = file.read_bytes().splitlines(keepends=True)[:lines] if file.is_file() else []
        write_atomic(file, b"".join(kept))

    def log(self, trial: str, line: TrainingStep | Evaluation) -> None:
        text = json.dumps(line.metrics(), allow_nan=True)  # a NaN loss is recorded as NaN
        path = self._run.paths.trial(trial).metrics
        with path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
        self._unsynced.add(path)

    def flush(self) -> None:
        for path in self._unsynced:
            sync(path)
        self._unsynced.clear()


class Sinks(Sink):
    """Several sinks as one."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    def start(self, trial: str, total_steps: int, steps: int, lines: int) -> None:
        for sink in self._sinks:
            sink.start(trial, total_steps, steps, lines)

    def log(self, trial: str, line: TrainingStep | Evaluation) -> None:
        for sink in self._sinks:
            sink.log(trial, line)

    def flush(self) -> None:
        for sink in self._sinks:
            sink.flush()

    def on_progress(self, trials: Sequence[str], what: str, done: int, total: int) -> None:
        for sink in self._sinks:
            sink.on_progress(trials, what, done, total)

    def notice(self, text: str) -> None:
        for sink in self._sinks:
            sink.notice(text)

    def finish(self, trial: str, status: str, best_epoch: int | None) -> None:
        for sink in self._sinks:
            sink.finish(trial, status, best_epoch)
