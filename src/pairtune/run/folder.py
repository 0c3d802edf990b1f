"""`Run` represents one run folder, whose files it reads on demand and tolerantly, and writes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from pairtune.config import RunConfig, TrialConfig
from pairtune.errors import BadInput
from pairtune.files import fill_folder, read_json, restore_moved, write_atomic, write_json
from pairtune.resolve_config import resolve
from pairtune.run.cache import FileCache, LogCache
from pairtune.run.metrics import Evaluation, MetricsLog
from pairtune.run.paths import RunPaths, TrialPaths
from pairtune.run.records import (
    RECORDS,
    AuditRecord,
    DataRecord,
    Environment,
    Generations,
    Lineage,
    MachineChoices,
    Progress,
    Record,
    Regressions,
    Selection,
    SweepRecord,
    TestRecord,
    TrialRecord,
)
from pairtune.run.schema import from_json, to_json

R = TypeVar("R", bound=Record)

_CACHE, _LOGS = FileCache(), LogCache()


class RunState(Enum):
    """The state of a run folder according to its files, which do not tell whether a process is working on it."""

    ABSENT = "absent"  # there is no run
    UNFINISHED = "unfinished"
    FINISHED = "finished"
    DAMAGED = "damaged"  # see `Run.damage`


@dataclass(frozen=True)
class Damage:
    """A file of a run folder that cannot be read, and why."""

    file: str
    reason: str

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True)
class Trial:
    """One trial of a run, with as much as it has recorded so far."""

    paths: TrialPaths
    config: TrialConfig | None
    record: TrialRecord | None
    log: MetricsLog

    @property
    def name(self) -> str:
        """The name of the trial's folder."""
        return self.paths.root.name

    @property
    def evaluations(self) -> list[Evaluation]:
        """The evaluations in the trial's record if it has ended, else those in its log."""
        return self.record.epochs if self.record else self.log.evaluations

    @property
    def best_epoch(self) -> int | None:
        """The epoch whose weights are kept; None if the trial has not ended."""
        return self.record.best_epoch if self.record else None

    @property
    def status(self) -> str:
        """`finished`, `failed` or `pruned`; `running` or `waiting` if the trial has not ended."""
        if self.record:
            return self.record.status
        return "running" if self.log.steps else "waiting"

    @property
    def label(self) -> str:
        """The trial's settings in readable form: `lr 3e-05, beta 0.1`."""
        if self.config is None:
            return self.name
        varied = [f"{name.replace('_', ' ')} {getattr(self.config, name)}" for name in self.config.varied]
        return ", ".join([f"lr {self.config.learning_rate:g}", f"beta {self.config.beta:g}", *varied])


class Run:
    """One run folder.

    Reading: attributes such as `selection` are None if the file is missing or damaged; `damage` lists what is damaged,
    and `state` tells how far the run has got. `need(Selection)` is for callers that require the record. Files are read
    again only if they have changed. Writing: `write(record)` is atomic.
    """

    def __init__(self, root: Path) -> None:
        self.paths = RunPaths(root)

    @classmethod
    def open(cls, root: Path) -> Run:
        """The run in a folder, in any state; never raises."""
        return cls(root)

    @classmethod
    def create(cls, root: Path, fill: Callable[[Run], None]) -> Run:
        """Create a new run folder whose initial content `fill` writes.

        Raises:
            BadInput: `root` exists and is not an empty folder; its content is not touched.
        """
        check_new(root)
        try:
            fill_folder(root, lambda temporary: fill(cls(temporary)), new=True)
        except OSError as error:
            check_new(root)  # another process may have been quicker
            raise BadInput(f"--out {root}: cannot be created ({error.strerror})") from error
        return cls(root)

    @classmethod
    def started(cls, root: Path) -> Run:
        """A run that may be unfinished.

        Raises:
            BadInput: there is no run in this folder.
        """
        run = cls(root)
        if not is_run(root):
            raise BadInput(f"{root}: not a run folder (config.yaml or data.json is missing)")
        return run

    @classmethod
    def finished(cls, root: Path) -> Run:
        """A run that has finished.

        Raises:
            BadInput: there is no such folder, or it has no `COMPLETE`.
        """
        run = cls(root)
        if not root.is_dir():
            raise BadInput(f"{root}: no such run folder")
        if not (run.complete or is_run(root)):
            raise BadInput(f"{root}: not a run folder (config.yaml or data.json is missing)")
        if not run.complete:
            raise BadInput(f"{root}: the run is unfinished (no COMPLETE); `pairtune resume {root}` continues it")
        return run

    @property
    def root(self) -> Path:
        """The path of the folder."""
        return self.paths.root

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.root.resolve().name

    # Reading --------------------------------------------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        """Whether the run has finished."""
        return bool(self.paths.complete.is_file())

    @property
    def ended_at(self) -> datetime | None:
        """When the run finished; None if it has not."""
        with suppress(OSError, ValueError):
            return datetime.fromisoformat(self.paths.complete.read_text(encoding="utf-8").strip())
        return None

    @property
    def state(self) -> RunState:
        """The state of the run; see `RunState`."""
        if not is_run(self.root):
            return RunState.ABSENT
        if self.damage:
            return RunState.DAMAGED
        return RunState.FINISHED if self.complete else RunState.UNFINISHED

    @property
    def damage(self) -> list[Damage]:
        """The files that cannot be read, or are missing although the run is complete."""
        reads: list[Callable[[], object]] = [self._config, *(partial(self._get, kind) for kind in RECORDS)]
        reads += [partial(self.read_trial, paths.root.name) for paths in self._trial_paths()]
        found = [damage for read in reads if (damage := self._damage(read))]
        if self.complete:
            needed = (DataRecord, SweepRecord, Selection)
            missing = [kind.file for kind in needed if not (self.root / kind.file).is_file()]
            found += [Damage(file, f"{file}: is missing, although the run is complete") for file in missing]
            if not self.paths.best.is_dir():
                found.append(Damage("best", "best: is missing; the run no longer has a model"))
        return found

    def get(self, kind: type[R]) -> R | None:
        """A record; None if it is missing or damaged."""
        try:
            return self._get(kind)
        except BadInput:
            return None

    def need(self, kind: type[R]) -> R:
        """A record that must be there.

        Raises:
            BadInput: it is missing or damaged.
        """
        found = self._get(kind)
        if found is None:
            raise BadInput(f"{self.root / kind.file}: is missing; the run has not got that far, or is damaged")
        return found

    @property
    def config(self) -> RunConfig | None:
        """The settings of the run; None if they cannot be read."""
        try:
            return self._config()
        except BadInput:
            return None

    @property
    def settings(self) -> RunConfig:
        """The settings of the run.

        Raises:
            BadInput: they cannot be read.
        """
        found = self._config()
        if found is None:
            raise BadInput(f"{self.paths.config}: is missing")
        return found

    @property
    def environment(self) -> Environment | None:
        """The environment in which the run was made."""
        return self.get(Environment)

    @property
    def lineage(self) -> Lineage | None:
        """The tuned model that the run started from; None if it started from a plain model."""
        return self.get(Lineage)

    @property
    def data(self) -> DataRecord | None:
        """The record of the data, with its row counts."""
        return self.get(DataRecord)

    @property
    def sweep(self) -> SweepRecord | None:
        """Summaries of all trials that have ended."""
        return self.get(SweepRecord)

    @property
    def selection(self) -> Selection | None:
        """The selected epoch and trial, once the selection is made."""
        return self.get(Selection)

    @property
    def test(self) -> TestRecord | None:
        """The one evaluation on the test pairs."""
        return self.get(TestRecord)

    @property
    def generations(self) -> Generations | None:
        """Answers before and after tuning."""
        return self.get(Generations)

    @property
    def regressions(self) -> Regressions | None:
        """The held-out pairs on which tuning hurt most."""
        return self.get(Regressions)

    @property
    def audit(self) -> AuditRecord | None:
        """The findings of the audit."""
        return self.get(AuditRecord)

    @property
    def progress(self) -> Progress | None:
        """What the process that works on the run is doing, or was doing when it ended."""
        return self.get(Progress)

    @property
    def choices(self) -> MachineChoices:
        """What was chosen for the run on its machine; empty for runs that did not record it."""
        environment = self.get(Environment)
        return environment.choices if environment else MachineChoices()

    @property
    def trials(self) -> list[Trial]:
        """Every trial that has a folder: first in the order of the sweep, then those that have not ended, by name."""
        order = {entry.name: position for position, entry in enumerate(self.sweep.trials if self.sweep else [])}
        names = [paths.root.name for paths in self._trial_paths()]
        return [self.trial(name) for name in sorted(names, key=lambda name: (order.get(name, len(order)), name))]

    def _trial_paths(self) -> list[TrialPaths]:
        folders = self.paths.trials.iterdir() if self.paths.trials.is_dir() else ()
        return [TrialPaths(each) for each in folders if each.is_dir() and not each.name.startswith(".")]

    def trial(self, name: str) -> Trial:
        """One trial, with as much as it has recorded so far."""
        paths, record = self.paths.trial(name), self.trial_record(name)
        return Trial(paths, record.trial if record else self._planned.get(name), record, self.log(name))

    def trial_record(self, name: str) -> TrialRecord | None:
        """The record of a trial that has ended; None if it has not, or if the record is damaged."""
        with suppress(BadInput):
            return self.read_trial(name)
        return None

    def read_trial(self, name: str) -> TrialRecord | None:
        """The record of a trial that has ended; None if it has not.

        Raises:
            BadInput: the record is damaged.
        """
        file = self.paths.trial(name).record
        return _CACHE.get(file, lambda: from_json(TrialRecord, read_json(file), str(file))) if file.is_file() else None

    def log(self, name: str) -> MetricsLog:
        """What a trial has logged, without a last line that is still being written."""
        return _LOGS.read(self.paths.trial(name).metrics)

    @cached_property
    def _planned(self) -> dict[str, TrialConfig]:
        """The settings of the grid's trials by name; for trials that have not ended, they are recorded nowhere else."""
        config = self.config
        return {trial.name: trial for trial in config.trials()} if config else {}

    def _config(self) -> RunConfig | None:
        file = self.paths.config
        return _CACHE.get(file, lambda: resolve(file, {}).config) if file.is_file() else None

    def _get(self, kind: type[R]) -> R | None:
        file = self.root / kind.file
        return _CACHE.get(file, lambda: from_json(kind, read_json(file), str(file))) if file.is_file() else None

    def _damage(self, read: Callable[[], object]) -> Damage | None:
        try:
            read()
        except BadInput as error:
            reason = str(error).replace(f"{self.root}/", "")
            return Damage(reason.partition(":")[0], reason)
        return None

    # Writing --------------------------------------------------------------------------------------------------------

    def write(self, record: Record) -> None:
        """Write a record to its file atomically; NaN and infinity raise ValueError, since no result contains them."""
        write_json(self.root / record.file, to_json(record))

    def write_trial(self, record: TrialRecord) -> None:
        """Write the record of a trial that has ended."""
        write_json(self.paths.trial(record.name).record, to_json(record))

    def remember(self, **choices: Any) -> None:
        """Add to the machine choices recorded for the run; does nothing if the run has no `environment.json`."""
        if (environment := self.environment) is None:
            return
        self.write(environment.model_copy(update={"choices": environment.choices.model_copy(update=choices)}))

    def mark_complete(self, ended: datetime) -> None:
        """Write `COMPLETE`, the last file that a run writes, with the moment that the run's report calls its end."""
        write_atomic(self.paths.complete, ended.isoformat() + "\n")

    def forget_half_written(self) -> None:
        """Remove the temporary files of interrupted writes, and undo those that were half done.

        Only for the process that holds the run's lock: the files may be another writer's.
        """
        restore_moved(self.root)
        for path in list(self.root.rglob(".*.tmp")):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def find_run(path: Path) -> tuple[Run, str | None] | None:
    """The run that a path names, and the trial's name if the path names one (`RUN/TRIAL` or `RUN/trials/TRIAL`)."""
    if (path / "config.yaml").is_file() or (path / "trials").is_dir():  # possibly unfinished or damaged
        return Run(path), None
    above = path.parent if path.parent.name != "trials" else path.parent.parent
    if path.name and is_run(above) and RunPaths(above).trial(path.name).root.is_dir():
        return Run(above), path.name
    return None


def is_run(root: Path) -> bool:
    """Whether a folder contains a run, finished or not."""
    return (root / "config.yaml").is_file() and (root / "data.json").is_file()


def check_new(root: Path) -> None:
    """Raise BadInput if a run folder cannot be created because something is there already."""
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise BadInput(f"--out {root}: already exists; choose another name, or remove it first")
