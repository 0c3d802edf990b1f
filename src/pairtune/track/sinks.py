"""What a sink is, the JSONL file that is always written, and several sinks as one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

from pairtune.runs import RunFolder


class Sink(Protocol):
    """Something that follows a grid of trials."""

    def start(self, trial: str, total_steps: int) -> None:
        """A trial begins; it will make `total_steps` steps."""

    def log(self, trial: str, record: dict[str, Any]) -> None:
        """One step or one evaluation: `step`, `epoch`, then metric names (an evaluation has `eval_loss`)."""

    def busy(self, trial: str, what: str, done: int, total: int) -> None:
        """A trial does something besides its steps, and is so far with it."""

    def finish(self, trial: str, status: str, best_epoch: int | None) -> None:
        """A trial has ended, with status `finished` or `failed`."""


class JsonlSink:
    """Appends each record to the trial's `metrics.jsonl`, a line a record, on disk at once."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run

    def start(self, trial: str, total_steps: int) -> None:
        self._run.trial(trial).root.mkdir(parents=True, exist_ok=True)

    def log(self, trial: str, record: dict[str, Any]) -> None:
        line = json.dumps(record, allow_nan=True)  # a loss that is NaN is on record as NaN
        with self._run.trial(trial).metrics.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def busy(self, trial: str, what: str, done: int, total: int) -> None:
        pass

    def finish(self, trial: str, status: str, best_epoch: int | None) -> None:
        pass


class Sinks:
    """Several sinks, each told everything."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    def start(self, trial: str, total_steps: int) -> None:
        for sink in self._sinks:
            sink.start(trial, total_steps)

    def log(self, trial: str, record: dict[str, Any]) -> None:
        for sink in self._sinks:
            sink.log(trial, record)

    def busy(self, trial: str, what: str, done: int, total: int) -> None:
        for sink in self._sinks:
            sink.busy(trial, what, done, total)

    def finish(self, trial: str, status: str, best_epoch: int | None) -> None:
        for sink in self._sinks:
            sink.finish(trial, status, best_epoch)
