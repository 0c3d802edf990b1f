"""progress.json: what a run is doing now."""

from __future__ import annotations

from pairtune.run.records.base import Record


class Progress(Record):
    """What a process that works on a run is doing.

    Attributes:
        stage: what it does, in words.
        done: the share of the run's time that is over, 0 to 1.
        seconds_left: the estimated time left; None while it is unknown.
        updated: when this was written, in Unix time; a run that is alive writes it at least once a minute or so.
        pid: the process.
        born: when the process started, in Unix time; guards against a reused pid.
    """

    file = "progress.json"

    stage: str
    done: float
    seconds_left: float | None = None
    updated: float
    pid: int
    born: float
