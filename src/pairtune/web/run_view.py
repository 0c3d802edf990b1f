"""Runs as the site shows them: finished, unfinished or damaged. Read-only."""

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

_QUIET_SECONDS = 600  # a run that the site did not start counts as interrupted after this silence


@dataclass
class ShownTrial:
    """One trial, finished or not."""

    trial: Trial
    winner: bool = False

    @property
    def name(self) -> str:
        """The trial's name."""
        return self.trial.name

    @property
    def steps(self) -> list[TrainingStep]:
        """The logged training steps."""
        return self.trial.log.steps

    @property
    def evaluations(self) -> list[Evaluation]:
        """The logged evaluations."""
        return self.trial.log.evaluations

    @property
    def rows(self) -> list[tuple[int, list[str], bool]]:
        """Table rows: epoch, cells in the assignment's columns, whether it is the best epoch."""
        return [
            (each.epoch, [_number(each.metric(metric)) for _, metric in COLUMNS], each.epoch == self.trial.best_epoch)
            for each in self.evaluations
        ]

    @property
    def status(self) -> str:
        """The trial's status in a word."""
        return self.trial.status


class ShownRun:
    """One run folder in any state; `fault` says why it cannot be shown."""

    def __init__(self, root: Path) -> None:
        self.run, self.name = Run.open(root), root.name

    @property
    def paths(self) -> RunPaths:
        """The run's paths."""
        return self.run.paths

    @cached_property
    def fault(self) -> str:
        """A line about what is damaged; empty if nothing is."""
        if self.run.state is RunState.ABSENT:
            return "config.yaml or data.json is missing, so this is not a run"
        damage = self.run.damage
        return damage[0].reason if damage else ""

    @cached_property
    def config(self) -> RunConfig | None:
        """The resolved settings; None if they cannot be read."""
        return self.run.config

    @cached_property
    def selection(self) -> Selection | None:
        """The selection, once it is made."""
        return self.run.selection

    @cached_property
    def audit(self) -> list[Finding]:
        """The audit's findings."""
        return self.run.audit.findings if self.run.audit else []

    @cached_property
    def data(self) -> DataRecord | None:
        """The data record: sources, splits and row counts."""
        return self.run.data

    @cached_property
    def test(self) -> TestRecord | None:
        """The result on the test pairs."""
        return self.run.test

    @cached_property
    def answers(self) -> list[BeforeAfter]:
        """The answers of base and winner to held-out prompts."""
        return before_and_after(self.run.generations, self.selection.winner) if self.selection else []

    @cached_property
    def trials(self) -> list[ShownTrial]:
        """The trials, finished or not."""
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
        # The job has ended; a later change means that the run was resumed elsewhere.
        if job and Path(job.log).is_file() and self.changed < Path(job.log).stat().st_mtime + 5:
            return "interrupted"
        return "running" if time.time() - self.changed < _QUIET_SECONDS else "interrupted"

    @cached_property
    def changed(self) -> float:
        """Unix time of the last change."""
        files = [*self.paths.root.glob("*"), *self.paths.trials.glob("*/*")]
        return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)

    @property
    def when(self) -> str:
        """The last change as text, in local time."""
        at = datetime.fromtimestamp(self.changed)
        return f"{at.day} {at:%B %Y, %H:%M}"

    @property
    def share(self) -> float:
        """The share of the training that is done, 0 to 1."""
        if self.config is None or not self.trials:
            return 0.0
        most = max(self.config.dimensions.get("epochs", [self.config.epochs]))
        done = [min(1.0, trial.steps[-1].epoch / most) if trial.steps else 0.0 for trial in self.trials]
        return sum(done) / len(done)

    @property
    def left(self) -> str:
        """The estimated training time left; empty if unknown."""
        if self.run.environment is None or not 0.02 < self.share < 1 or self.state != "running":
            return ""
        began = datetime.fromisoformat(self.run.environment.started).timestamp()
        return duration((time.time() - began) * (1 - self.share) / self.share)

    @property
    def summary(self) -> str:
        """A line about the run, for the list of runs."""
        if self.fault:
            return self.fault
        if self.selection:
            return self.selection.why
        count = len(self.trials)
        return f"{count} trial{'' if count == 1 else 's'}, {self.share:.0%} of the training"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def is_alive(job: Job) -> bool:
    """Whether the job's process is still running."""
    try:
        process = psutil.Process(job.pid)
        return abs(process.create_time() - job.born) < 2 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def all_runs() -> list[ShownRun]:
    """All runs in the folder, last changed first, damaged ones included."""
    root: Path = settings.PAIRTUNE_RUNS
    folders = (
        [each for each in root.iterdir() if each.is_dir() and not each.name.startswith(".")] if root.is_dir() else []
    )
    return sorted(map(ShownRun, folders), key=lambda run: -run.changed)


def find_run(name: str) -> ShownRun:
    """Find a run by name.

    Raises:
        Http404: there is no run of this name.
    """
    root: Path = settings.PAIRTUNE_RUNS
    if os.sep in name or name.startswith(".") or not (root / name).is_dir():
        raise Http404(f"There is no run named {name}.")
    return ShownRun(root / name)
