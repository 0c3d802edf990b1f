"""Runs as the site shows them: finished, unfinished or damaged. Read-only."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path

import psutil
from django.conf import settings
from django.http import Http404
from django.urls import reverse
from django.utils.safestring import SafeString, mark_safe

from pairtune.config import RunConfig
from pairtune.report.charts import SERIES as COLOURS
from pairtune.report.charts import draw, sparkline
from pairtune.report.phrases import differs, duration, short
from pairtune.report.report_data import COLUMNS, BeforeAfter, before_and_after
from pairtune.report.series import LIVE, charts
from pairtune.report.verdict import (
    FaultCount,
    Verdict,
    WorsePrompt,
    disagreements,
    fault_counts,
    regressed_pairs,
    verdict,
    worse_prompts,
)
from pairtune.run.folder import Run, RunState, Trial
from pairtune.run.metrics import Evaluation, TrainingStep
from pairtune.run.paths import RunPaths
from pairtune.run.records import DataRecord, Finding, Progress, RegressedPair, Selection, TestRecord
from pairtune.web import jobs
from pairtune.web.models import Job

_QUIET_SECONDS = 600  # a run without a known process counts as interrupted after this silence


@dataclass(frozen=True)
class Drawn:
    """A chart, drawn."""

    title: str
    svg: SafeString


@dataclass(frozen=True)
class Group:
    """All findings of one audit rule: what is the same for all of them, and the trials with their evidence."""

    first: Finding
    cases: list[tuple[str, str]]


@dataclass(frozen=True)
class Use:
    """What a run takes of this machine.

    Attributes:
        memory: its memory in GB.
        processors: how many processors it has used, on average.
        total_memory, total_processors: what there is.
    """

    memory: float
    processors: float
    total_memory: float
    total_processors: int


@dataclass(frozen=True)
class ShownTrial:
    """One trial, finished or not.

    Attributes:
        number: its position in the grid, which decides its colour.
        varied: the settings that set the trials of its run apart, each with its value.
        ranked: its best epoch's numbers, each with its interval: loss, accuracy, margin; empty until it is ranked.
        differs: whether it differs from the winner.
        better: whether it is better than the base.
    """

    trial: Trial
    number: int
    winner: bool
    varied: tuple[tuple[str, str], ...]
    ranked: tuple[tuple[float, str], ...] = ()
    differs: str = ""
    better: str = ""

    @property
    def name(self) -> str:
        """The trial's name."""
        return self.trial.name

    @property
    def label(self) -> str:
        """The trial's settings in readable form."""
        return self.trial.label

    @property
    def colour(self) -> int:
        """The number of its colour."""
        return self.number % COLOURS

    @property
    def steps(self) -> list[TrainingStep]:
        """The logged training steps."""
        return self.trial.log.steps

    @property
    def evaluations(self) -> list[Evaluation]:
        """The logged evaluations."""
        return self.trial.evaluations

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

    @property
    def reason(self) -> str:
        """Why it did not finish; empty if it did."""
        return self.trial.record.reason if self.trial.record else ""


class ShownRun:
    """One run folder in any state; `fault` says why it cannot be shown."""

    def __init__(self, root: Path) -> None:
        self.name, self._closed, self._root = root.name, _closed(root), root
        # What may not be read is shown as a run without files, so that one such folder does not hide the others.
        self.run = Run.open(Path(os.devnull, root.name) if self._closed else root)

    @property
    def paths(self) -> RunPaths:
        """The run's paths."""
        return self.run.paths

    @cached_property
    def fault(self) -> str:
        """A line about what is damaged; empty if nothing is."""
        if self._closed:
            return f"{self._closed}: may not be read by the user that runs this site"
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
    def verdict(self) -> Verdict | None:
        """The outcome, once there is one."""
        return verdict(self.run)

    @cached_property
    def findings(self) -> list[Group]:
        """The audit's findings by rule, the worst first."""
        labels = {trial.name: trial.label for trial in self.run.trials}

        def case(finding: Finding) -> tuple[str, str]:
            return ", ".join(labels.get(name, name) for name in finding.trials), finding.evidence

        groups = self.run.audit.by_rule() if self.run.audit else []
        return [Group(group[0], [case(finding) for finding in group]) for group in groups]

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
    def faults(self) -> list[FaultCount]:
        """How often each fault of form occurs before and after tuning; empty if neither has any."""
        found = fault_counts(self.run.generations, self.selection.winner) if self.selection else []
        return found if self.answers else []

    @cached_property
    def hurt_pairs(self) -> list[RegressedPair]:
        """The held-out pairs on which tuning hurt most."""
        return regressed_pairs(self.run)

    @cached_property
    def disagreements(self) -> tuple[str, int, int] | None:
        """On how many held-out pairs the model moved towards the rejected answer."""
        return disagreements(self.run)

    @cached_property
    def hurt_prompts(self) -> list[WorsePrompt]:
        """The prompts to which the tuned answer has new faults of form."""
        return worse_prompts(self.run.generations, self.selection.winner) if self.selection else []

    @cached_property
    def varied(self) -> list[str]:
        """The names of the settings that are columns of the table of trials."""
        return [_called(name) for name in ("learning_rate", "beta", *self._further)]

    @cached_property
    def _further(self) -> tuple[str, ...]:
        configs = (trial.config for trial in self.run.trials)
        return next((config.varied for config in configs if config), ())

    @cached_property
    def trials(self) -> list[ShownTrial]:
        """The trials, finished or not, in grid order."""
        selection = self.selection
        ranking = {entry.name: entry for entry in selection.ranking} if selection else {}
        compared = {entry.name: entry for entry in selection.comparisons} if selection else {}
        found = []
        for number, trial in enumerate(self.run.trials):
            config, entry = trial.config, ranking.get(trial.name)
            names = ("learning_rate", "beta", *self._further)
            found.append(
                ShownTrial(
                    trial,
                    number,
                    selection is not None and trial.name == selection.winner,
                    tuple((_called(name), short(getattr(config, name))) for name in names) if config else (),
                    tuple((entry.metrics.metric(name) or 0.0, entry.with_interval(name)) for name in _RANKED)
                    if entry
                    else (),
                    differs(compared.get(trial.name)),
                    ("yes" if entry.against_base.better else "not shown") if entry else "",
                )
            )
        return found

    def charts(self, names: Sequence[str] | None = None) -> tuple[Drawn, ...]:
        """The charts of these names, or all of them; a point leads to its evaluation's pairs."""
        return _drawn(self.paths.root, None if names is None else tuple(names), self.changed)

    @property
    def live_charts(self) -> tuple[Drawn, ...]:
        """The charts of a run that trains."""
        return self.charts(LIVE)

    @property
    def all_charts(self) -> tuple[Drawn, ...]:
        """All charts."""
        return self.charts()

    @cached_property
    def sparkline(self) -> SafeString:
        """The trials' validation losses, small; training losses while nothing has been evaluated."""
        found = charts(self.run.trials, None)
        chart = found.get("loss") or found.get("training-loss")
        drawn = sparkline(chart.lines) if chart else ""
        if not drawn and "training-loss" in found:
            drawn = sparkline(found["training-loss"].lines)
        return mark_safe(drawn)  # noqa: S308 - numbers alone

    @cached_property
    def progress(self) -> Progress | None:
        """What the process that works on the run wrote last."""
        return self.run.progress

    @cached_property
    def job(self) -> Job | None:
        """The last process that the site started for it."""
        return jobs.last(("tune", "resume"), self.name)

    @cached_property
    def worker(self) -> Job | Progress | None:
        """The process that works on the run now, whoever started it."""
        candidates = (self.progress, self.job)
        return next((each for each in candidates if each and jobs.is_alive(each)), None)

    @cached_property
    def state(self) -> str:
        """`finished`, `running`, `interrupted` or `broken`."""
        if self.fault:
            return "broken"
        if self.run.complete:
            return "finished"
        if self.worker:
            return "running"
        # A process that is not known may be on another machine, or of an earlier version, which wrote no progress.
        known = self.progress or self.job
        quiet = time.time() - self.changed > _QUIET_SECONDS
        return "interrupted" if known or quiet else "running"

    @cached_property
    def use(self) -> Use | None:
        """What the run takes of this machine; None if its process is not known."""
        used = jobs.resources(self.worker) if self.worker else None
        if used is None:
            return None
        memory = psutil.virtual_memory().total / 2**30
        return Use(used[0], used[1], memory, psutil.cpu_count() or 1)

    @cached_property
    def changed(self) -> float:
        """Unix time of the last change."""
        files = [*self.paths.root.glob("*"), *self.paths.trials.glob("*/*")]
        return max((file.stat().st_mtime for file in files if file.exists()), default=self._root.stat().st_mtime)

    @property
    def when(self) -> str:
        """The last change as text, in local time."""
        at = datetime.fromtimestamp(self.changed)
        return f"{at.day} {at:%b %Y, %H:%M}"

    @property
    def share(self) -> float:
        """The share of the time that is over, 0 to 1."""
        if self.progress:
            return self.progress.done
        if self.config is None or not self.trials:
            return 0.0
        most = max(self.config.dimensions.get("epochs", [self.config.epochs]))
        done = [min(1.0, trial.steps[-1].epoch / most) if trial.steps else 0.0 for trial in self.trials]
        return sum(done) / len(done)

    @property
    def left(self) -> str:
        """The estimated time left; empty if unknown."""
        if self.progress is None or self.progress.seconds_left is None or self.state != "running":
            return ""
        return duration(max(0.0, self.progress.seconds_left - (time.time() - self.progress.updated)))

    @property
    def stage(self) -> str:
        """What the run is doing."""
        return self.progress.stage if self.progress else ""

    @property
    def lineage(self) -> list[str]:
        """The fingerprints of the weights that the run started from."""
        found = (trial.record.base_fingerprint for trial in self.run.trials if trial.record)
        return list(dict.fromkeys(filter(None, found))) or ["not recorded"]

    @property
    def settings_text(self) -> str:
        """The settings as they were resolved, with the origin of each value."""
        return self.paths.config.read_text(encoding="utf-8", errors="replace") if self.paths.config.is_file() else ""

    @property
    def training_pairs(self) -> int | None:
        """The number of training pairs."""
        return self.data.splits["train"].pairs if self.data and "train" in self.data.splits else None

    @property
    def accuracy(self) -> tuple[float, str] | None:
        """The winner's accuracy with its interval: on the test pairs, else on the validation pairs."""
        if not self.selection:
            return None
        measured = self.test or self.selection.ranking[0]
        low, high = measured.intervals["eval_rewards/accuracies"]
        return measured.metrics.accuracy, f"{measured.metrics.accuracy:.0%} [{low:.0%}, {high:.0%}]"


@lru_cache(maxsize=64)
def _drawn(root: Path, names: tuple[str, ...] | None, _: float) -> tuple[Drawn, ...]:
    """The charts of a run as it was when it changed last."""
    run = ShownRun(root)
    address = reverse("pairs", args=(run.name,))

    def link(trial: Trial, epoch: int) -> str:
        return f"{address}?trial={trial.name}&epoch={epoch}"

    found = charts(run.run.trials, run.selection.winner if run.selection else None, link)
    return tuple(
        Drawn(chart.title, mark_safe(draw(chart)))  # noqa: S308 - escaped where it is drawn
        for name, chart in found.items()
        if names is None or name in names
    )


def _closed(root: Path) -> str:
    """The first part of a run's folder that this process may not read, by its name; empty if it may read all."""
    for path in (root, *root.glob("*"), *root.glob("trials/*"), *root.glob("trials/*/*")):
        if path != root and path.name.startswith("."):
            continue  # a file that is being written
        wanted = os.R_OK | (os.X_OK if path.is_dir() else 0)
        if not os.access(path, wanted) and path.exists():
            return str(path.relative_to(root.parent))
    return ""


_RANKED = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")


def _called(name: str) -> str:
    return {"learning_rate": "Learning rate", "beta": "\N{GREEK SMALL LETTER BETA}"}.get(
        name, name.replace("_", " ").capitalize()
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


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
    # Path.is_dir raises for a name that is too long.
    if os.sep in name or name.startswith(".") or not os.path.isdir(root / name):
        raise Http404(f"There is no run named {name}.")
    return ShownRun(root / name)
