"""Runs as the site shows them: finished, unfinished or damaged. Nothing is written here."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path

import psutil
from django.conf import settings
from django.http import Http404

from pairtune.config import RunConfig
from pairtune.report.phrases import duration
from pairtune.report.report_data import COLUMNS, BeforeAfter, before_and_after
from pairtune.run.folder import Run, RunState, Trial
from pairtune.run.metrics import Evaluation, TrainingStep
from pairtune.run.paths import RunPaths
from pairtune.run.records import DataRecord, Finding, Selection, TestRecord
from pairtune.web.models import Job

_QUIET_SECONDS = 600  # a run that has written nothing for so long, and is no job of ours, is taken to be interrupted


@dataclass
class ShownTrial:
    """One trial as far as it is."""

    trial: Trial
    winner: bool = False

    @property
    def name(self) -> str:
        """Of the trial."""
        return self.trial.name

    @property
    def steps(self) -> list[TrainingStep]:
        """That it has made."""
        return self.trial.log.steps

    @property
    def evaluations(self) -> list[Evaluation]:
        """That it has logged."""
        return self.trial.log.evaluations

    @property
    def rows(self) -> list[tuple[int, list[str], bool]]:
        """Of the table: epoch, cells in the assignment's columns, whether it is the one that was kept."""
        return [
            (each.epoch, [_number(each.metric(metric)) for _, metric in COLUMNS], each.epoch == self.trial.best_epoch)
            for each in self.evaluations
        ]

    @property
    def status(self) -> str:
        """In a word."""
        return self.trial.status


class ShownRun:
    """One run folder, whatever state it is in; `fault` says why it cannot be shown."""

    def __init__(self, root: Path) -> None:
        self.run, self.name = Run.open(root), root.name

    @property
    def paths(self) -> RunPaths:
        """Of the run."""
        return self.run.paths

    @cached_property
    def fault(self) -> str:
        """What is damaged, in a line; empty: nothing."""
        if self.run.state is RunState.ABSENT:
            return "config.yaml or data.json is missing, so this is no run"
        damage = self.run.damage
        return damage[0].reason if damage else ""

    @cached_property
    def config(self) -> RunConfig | None:
        """As the run resolved it; None where it cannot be read."""
        return self.run.config

    @cached_property
    def selection(self) -> Selection | None:
        """The choice, once it is made."""
        return self.run.selection

    @cached_property
    def audit(self) -> list[Finding]:
        """The findings."""
        return self.run.audit.findings if self.run.audit else []

    @cached_property
    def data(self) -> DataRecord | None:
        """The account of the rows."""
        return self.run.data

    @cached_property
    def test(self) -> TestRecord | None:
        """The look at the test pairs."""
        return self.run.test

    @cached_property
    def answers(self) -> list[BeforeAfter]:
        """What base and winner said to held-out prompts."""
        return before_and_after(self.run.generations, self.selection.winner) if self.selection else []

    @cached_property
    def trials(self) -> list[ShownTrial]:
        """As far as they are."""
        winner = self.selection.winner if self.selection else None
        return [ShownTrial(trial, trial.name == winner) for trial in self.run.trials]

    @cached_property
    def state(self) -> str:
        """`finished`, `running`, `interrupted` or `broken`."""
        if self.fault:
            return "broken"
        if self.run.complete:
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
        files = [*self.paths.root.glob("*"), *self.paths.trials.glob("*/*")]
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
        done = [min(1.0, trial.steps[-1].epoch / most) if trial.steps else 0.0 for trial in self.trials]
        return sum(done) / len(done)

    @property
    def left(self) -> str:
        """About how long the training still takes; empty where that is not known."""
        if self.run.environment is None or not 0.02 < self.share < 1 or self.state != "running":
            return ""
        began = datetime.fromisoformat(self.run.environment.started).timestamp()
        return duration((time.time() - began) * (1 - self.share) / self.share)

    @property
    def summary(self) -> str:
        """In a line, for the list."""
        if self.fault:
            return self.fault
        if self.selection:
            return self.selection.why
        count = len(self.trials)
        return f"{count} trial{'' if count == 1 else 's'}, {self.share:.0%} of the training"


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
    """Every run in the folder, the last changed first, damaged ones included."""
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
    if os.sep in name or name.startswith(".") or not (root / name).is_dir():
        raise Http404(f"There is no run called {name}.")
    return ShownRun(root / name)
