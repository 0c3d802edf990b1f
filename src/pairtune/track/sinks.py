"""What a sink is, the JSONL file that is always written, and several sinks as one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Protocol

from pairtune.files import write_atomic
from pairtune.run.folder import Run
from pairtune.run.metrics import Evaluation, TrainingStep


class Sink(Protocol):
    """Something that follows a grid of trials."""

    def start(self, trial: str, total_steps: int, steps: int, lines: int) -> None:
        """A trial begins, or goes on.

        Args:
            trial: its name.
            total_steps: that it will make.
            steps: that it has made already.
            lines: that it has logged by then; what else is on record of it is of steps that will be made again.
        """

    def log(self, trial: str, line: TrainingStep | Evaluation) -> None:
        """One step or one evaluation."""

    def on_progress(self, trials: Sequence[str], what: str, done: int, total: int) -> None:
        """Trials do something besides their steps, and are so far with it."""

    def finish(self, trial: str, status: str, best_epoch: int | None) -> None:
        """A trial has ended, with status `finished` or `failed`."""


class JsonlSink:
    """Appends each record to the trial's `metrics.jsonl`, a line a record, on disk at once."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def start(self, trial: str, total_steps: int, steps: int, lines: int) -> None:
        file = self._run.paths.trial(trial).metrics
        kept = file.read_bytes().splitlines(keepends=True)[:lines] if file.is_file() else []
        write_atomic(file, b"".join(kept))

    def log(self, trial: str, line: TrainingStep | Evaluation) -> None:
        text = json.dumps(line.metrics(), allow_nan=True)  # a loss that is NaN is on record as NaN
        with self._run.paths.trial(trial).metrics.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def on_progress(self, trials: Sequence[str], what: str, done: int, total: int) -> None:
        pass

    def finish(self, trial: str, status: str, best_epoch: int | None) -> None:
        pass


class Sinks:
    """Several sinks, each told everything."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    def start(self, trial: str, total_steps: int, steps: int, lines: int) -> None:
        for sink in self._sinks:
            sink.start(trial, total_steps, steps, lines)

    def log(self, trial: str, line: TrainingStep | Evaluation) -> None:
        for sink in self._sinks:
            sink.log(trial, line)

    def on_progress(self, trials: Sequence[str], what: str, done: int, total: int) -> None:
        for sink in self._sinks:
            sink.on_progress(trials, what, done, total)

    def finish(self, trial: str, status: str, best_epoch: int | None) -> None:
        for sink in self._sinks:
            sink.finish(trial, status, best_epoch)
