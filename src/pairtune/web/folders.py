"""Runs as the site shows them: read from their folders, finished, unfinished or broken. Nothing is written here."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import psutil
from django.conf import settings
from django.http import Http404

from pairtune.config import RunConfig, resolve
from pairtune.errors import BadInput
from pairtune.report.gather import COLUMNS
from pairtune.report.words import duration
from pairtune.runs import RunFolder
from pairtune.web.models import Job

_QUIET_SECONDS = 600  # a run that has written nothing for so long, and is no job of ours, is taken to be interrupted


@dataclass
class ShownTrial:
    """One trial as far as it is."""

    name: str
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    record: dict[str, Any] | None
    winner: bool = False

    @property
    def rows(self) -> list[tuple[int, list[str], bool]]:
        """Of the table: epoch, cells in the assignment's columns, whether it is the one that was kept."""
        best = self.record["best_epoch"] if self.record else None
        return [
            (round(each["epoch"]), [_number(each.get(metric)) for _, metric in COLUMNS], each["epoch"] == best)
            for each in self.evaluations
        ]

    @property
    def status(self) -> str:
        """In a word."""
        return self.record["status"] if self.record else "running" if self.steps else "waiting"


class ShownRun:
    """One run folder, whatever state it is in; `fault` says why it cannot be shown."""

    def __init__(self, root: Path) -> None:
        self.folder, self.name = RunFolder(root), root.name
        self.fault = ""

    @cached_property
    def config(self) -> RunConfig | None:
        """As the run resolved it; None where it cannot be read."""
        try:
            return _config(self.folder.config, *_stamp(self.folder.config))
        except BadInput as error:
            self.fault = self._said(error)
            return None

    @cached_property
    def selection(self) -> dict[str, Any] | None:
        """The choice, once it is made."""
        return self._read(self.folder.selection)

    @cached_property
    def audit(self) -> list[dict[str, Any]]:
        """The findings."""
        return (self._read(self.folder.audit) or {}).get("findings", [])

    @cached_property
    def data(self) -> dict[str, Any]:
        """The account of the rows."""
        return self._read(self.folder.data) or {}

    @cached_property
    def test(self) -> dict[str, Any] | None:
        """The look at the test pairs."""
        return self._read(self.folder.test)

    @cached_property
    def answers(self) -> list[dict[str, str]]:
        """What base and winner said to held-out prompts."""
        said = self._read(self.folder.generations)
        if not said or not self.selection or self.selection["winner"] not in said["models"]:
            return []
        sides = (said["models"]["base"]["answers"], said["models"][self.selection["winner"]]["answers"])
        return [
            {"prompt": prompt[-1]["content"], "base": base["text"], "tuned": tuned["text"]}
            for prompt, base, tuned in zip(said["prompts"], *sides, strict=True)
        ]

    @cached_property
    def trials(self) -> list[ShownTrial]:
        """As far as they are."""
        winner = self.selection["winner"] if self.selection else None
        folders = sorted(self.folder.trials.iterdir()) if self.folder.trials.is_dir() else []
        return [self._trial(each.name, winner) for each in folders if each.is_dir()]

    @cached_property
    def state(self) -> str:
        """`finished`, `running`, `interrupted` or `broken`."""
        self._check()
        if self.fault:
            return "broken"
        if self.folder.complete.is_file():
            return "finished"
        job = Job.objects.filter(name=self.name).first()
        if job and is_alive(job):
            return "running"
        # A job that has ended, unless somebody has gone on with its run since.
        if job and Path(job.log).is_file() and self.changed < Path(job.log).stat().st_mtime + 5:
            return "interrupted"
        return "running" if time.time() - self.changed < _QUIET_SECONDS else "interrupted"

    @cached_property
    def changed(self) -> float:
        """When something was last written, seconds since 1970."""
        files = [*self.folder.root.glob("*"), *self.folder.trials.glob("*/*")]
        return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)

    @property
    def when(self) -> str:
        """The same for people, by this machine's clock."""
        at = datetime.fromtimestamp(self.changed)
        return f"{at.day} {at:%B %Y, %H:%M}"

    @property
    def share(self) -> float:
        """How much of the training is done, 0 to 1."""
        if self.config is None or not self.trials:
            return 0.0
        most = max(self.config.dimensions.get("epochs", [self.config.epochs]))
        done = [min(1.0, trial.steps[-1]["epoch"] / most) if trial.steps else 0.0 for trial in self.trials]
        return sum(done) / len(done)

    @property
    def left(self) -> str:
        """About how long the training still takes; empty where that is not known."""
        lines = list(self.folder.trials.glob("*/metrics.jsonl"))
        begun = min((each.stat().st_ctime for each in self.folder.trials.glob("*")), default=None)
        began = _started(self._read(self.folder.environment)) or begun
        if not lines or not began or not 0.02 < self.share < 1 or self.state != "running":
            return ""
        return duration((time.time() - began) * (1 - self.share) / self.share)

    @property
    def summary(self) -> str:
        """In a line, for the list."""
        if self.state == "broken":
            return self.fault
        if self.selection:
            return str(self.selection["why"])
        return f"{len(self.trials)} trials, {self.share:.0%} of the training"

    def _said(self, error: BadInput) -> str:
        """With names as they are inside the run."""
        return str(error).replace(f"{self.folder.root}{os.sep}", "")

    def _check(self) -> None:
        """Find what is damaged."""
        if self.config is None:
            return
        needed = [self.folder.data]
        if self.folder.complete.is_file():
            needed += [self.folder.selection, self.folder.sweep]
            if not self.folder.best.is_dir():
                self.fault = "best: is gone; the run has no model any more"
        for file in needed:
            try:
                _json(file, *_stamp(file))
            except BadInput as error:
                self.fault = self._said(error)

    def _read(self, file: Path) -> Any:
        if not file.is_file():
            return None
        try:
            return _json(file, *_stamp(file))
        except BadInput as error:
            self.fault = self.fault or self._said(error)
            return None

    def _trial(self, name: str, winner: str | None) -> ShownTrial:
        folder = self.folder.trial(name)
        lines = _lines(folder.metrics, *_stamp(folder.metrics))
        steps = [line for line in lines if "eval_loss" not in line and "loss" in line and "epoch" in line]
        losses = {round(line["epoch"]): line["loss"] for line in steps}
        evaluations = [
            {"loss": losses.get(round(line["epoch"])), **line}
            for line in lines
            if "eval_loss" in line and "epoch" in line
        ]
        return ShownTrial(name, steps, evaluations, self._read(folder.record), name == winner)


# Files are read again only when they have changed: a page of fifty runs looks at hundreds.


def _stamp(file: Path) -> tuple[int, int]:
    """What changes with the content; zeros where there is no file."""
    try:
        found = file.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


@lru_cache(maxsize=256)
def _config(file: Path, *_: int) -> RunConfig:
    return resolve(file, {}).config


@lru_cache(maxsize=1024)
def _json(file: Path, *_: int) -> Any:
    return RunFolder(file.parent).read_json(file)


@lru_cache(maxsize=256)
def _lines(file: Path, *_: int) -> list[dict[str, Any]]:
    """The lines of a file that may be written to meanwhile: a last one that is not whole is left out."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def _started(environment: dict[str, Any] | None) -> float | None:
    return datetime.fromisoformat(environment["started"]).timestamp() if environment else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def is_alive(job: Job) -> bool:
    """Whether the job's process still works."""
    try:
        process = psutil.Process(job.pid)
        return abs(process.create_time() - job.born) < 2 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def all_runs() -> list[ShownRun]:
    """Every run in the folder, the last changed first, broken ones included."""
    root: Path = settings.PAIRTUNE_RUNS
    folders = (
        [each for each in root.iterdir() if each.is_dir() and not each.name.startswith(".")] if root.is_dir() else []
    )
    return sorted(map(ShownRun, folders), key=lambda run: -run.changed)


def find_run(name: str) -> ShownRun:
    """One of them.

    Raises:
        Http404: there is none of this name.
    """
    root: Path = settings.PAIRTUNE_RUNS
    if "/" in name or name.startswith(".") or not (root / name).is_dir():
        raise Http404(f"There is no run called {name}.")
    return ShownRun(root / name)
