"""`Run`: one run folder, read lazily and tolerantly, and written through."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from pydantic import ValidationError

from pairtune.config import RunConfig, TrialConfig, resolve
from pairtune.errors import BadInput
from pairtune.files import fill_folder, read_json, write_atomic, write_json
from pairtune.run.metrics import Evaluation, TrainingStep, parse_line
from pairtune.run.paths import RunPaths, TrialPaths
from pairtune.run.records import (
    RECORDS,
    AuditRecord,
    DataRecord,
    Environment,
    Generations,
    MachineChoices,
    Record,
    Selection,
    SweepRecord,
    TestRecord,
    TrialRecord,
)
from pairtune.run.schema import from_json, to_json

R = TypeVar("R", bound=Record)


class RunState(Enum):
    """How far a run folder has come, as its files say; whether a process works on it they do not say."""

    ABSENT = "absent"  # no run lies there
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


@dataclass
class MetricsLog:
    """What a trial has logged so far.

    Attributes:
        steps: in their order.
        evaluations: in their order.
        unreadable: whole lines that are neither.
    """

    steps: list[TrainingStep] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    unreadable: int = 0

    def add(self, line: TrainingStep | Evaluation) -> None:
        """Put a line where it belongs."""
        if isinstance(line, Evaluation):
            self.evaluations.append(line)
        else:
            self.steps.append(line)


@dataclass(frozen=True)
class Trial:
    """One trial of a run, as far as it is."""

    paths: TrialPaths
    config: TrialConfig | None
    record: TrialRecord | None
    log: MetricsLog

    @property
    def name(self) -> str:
        """That of its folder."""
        return self.paths.root.name

    @property
    def evaluations(self) -> list[Evaluation]:
        """Those on record where the trial has ended, else those that it has logged."""
        return self.record.epochs if self.record else self.log.evaluations

    @property
    def best_epoch(self) -> int | None:
        """Whose weights are kept, where the trial has ended."""
        return self.record.best_epoch if self.record else None

    @property
    def status(self) -> str:
        """`finished`, `failed` or `pruned`; of a trial that has not ended `running` or `waiting`."""
        if self.record:
            return self.record.status
        return "running" if self.log.steps else "waiting"

    @property
    def label(self) -> str:
        """Its settings as a person reads them: `lr 3e-05, beta 0.1`."""
        if self.config is None:
            return self.name
        varied = [f"{name.replace('_', ' ')} {getattr(self.config, name)}" for name in self.config.varied]
        return ", ".join([f"lr {self.config.learning_rate:g}", f"beta {self.config.beta:g}", *varied])


class Run:
    """One run folder.

    Reading: attributes such as `selection` are None where the file is missing or damaged; `damage` says what is
    damaged, `state` how far the run is. `need(Selection)` is for those who cannot go on without it. Files are read
    again only when they have changed. Writing: `write(record)`, atomically.
    """

    def __init__(self, root: Path) -> None:
        self.paths = RunPaths(root)

    @classmethod
    def open(cls, root: Path) -> Run:
        """The run in a folder, whatever state it is in; raises nothing."""
        return cls(root)

    @classmethod
    def create(cls, root: Path, fill: Callable[[Run], None]) -> Run:
        """Make a new run folder, with what `fill` writes there from the start.

        Raises:
            BadInput: `root` exists and is not an empty folder; nothing in it is touched.
        """
        check_new(root)
        try:
            fill_folder(root, lambda temporary: fill(cls(temporary)))
        except OSError as error:
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
            raise BadInput(f"{root}: no run folder (no config.yaml and data.json in it)")
        return run

    @classmethod
    def finished(cls, root: Path) -> Run:
        """A run that may be served or read as a result.

        Raises:
            BadInput: there is no such folder, or it has no `COMPLETE`.
        """
        run = cls(root)
        if not root.is_dir():
            raise BadInput(f"{root}: no such run folder")
        if not run.complete:
            raise BadInput(f"{root}: the run is unfinished (no COMPLETE); `pairtune resume {root}` goes on with it")
        return run

    @property
    def root(self) -> Path:
        """The folder."""
        return self.paths.root

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.root.resolve().name

    # Reading --------------------------------------------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        """Whether the run has come to its end."""
        return bool(self.paths.complete.is_file())

    @property
    def ended_at(self) -> datetime | None:
        """When it did."""
        with suppress(OSError, ValueError):
            return datetime.fromisoformat(self.paths.complete.read_text(encoding="utf-8").strip())
        return None

    @property
    def state(self) -> RunState:
        """How far the run is."""
        if not is_run(self.root):
            return RunState.ABSENT
        if self.damage:
            return RunState.DAMAGED
        return RunState.FINISHED if self.complete else RunState.UNFINISHED

    @property
    def damage(self) -> list[Damage]:
        """What cannot be read, or is missing though the run is complete."""
        reads: list[Callable[[], object]] = [self._config, *(partial(self._get, kind) for kind in RECORDS)]
        reads += [partial(self.read_trial, paths.root.name) for paths in self._trial_paths()]
        found = [damage for read in reads if (damage := self._damage(read))]
        if self.complete:
            needed = (DataRecord, SweepRecord, Selection)
            missing = [kind.file for kind in needed if not (self.root / kind.file).is_file()]
            found += [Damage(file, f"{file}: is missing, though the run is complete") for file in missing]
            if not self.paths.best.is_dir():
                found.append(Damage("best", "best: is missing; the run has no model any more"))
        return found

    def get(self, kind: type[R]) -> R | None:
        """A record; None where it is missing or damaged."""
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
            raise BadInput(f"{self.root / kind.file}: is missing; the run has not come so far, or is damaged")
        return found

    @property
    def config(self) -> RunConfig | None:
        """The settings of the run; None where they cannot be read."""
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
        """What the run was made with."""
        return self.get(Environment)

    @property
    def data(self) -> DataRecord | None:
        """The account of the rows."""
        return self.get(DataRecord)

    @property
    def sweep(self) -> SweepRecord | None:
        """All trials that have ended, in short."""
        return self.get(SweepRecord)

    @property
    def selection(self) -> Selection | None:
        """The choice, once it is made."""
        return self.get(Selection)

    @property
    def test(self) -> TestRecord | None:
        """The one look at the test pairs."""
        return self.get(TestRecord)

    @property
    def generations(self) -> Generations | None:
        """Answers before and after."""
        return self.get(Generations)

    @property
    def audit(self) -> AuditRecord | None:
        """What the audit found."""
        return self.get(AuditRecord)

    @property
    def choices(self) -> MachineChoices:
        """What was chosen for the run on its machine; empty for runs that did not keep it."""
        environment = self.get(Environment)
        return environment.choices if environment else MachineChoices()

    @property
    def trials(self) -> list[Trial]:
        """Every trial that has a folder: in the order of the sweep, then those that have not ended, by name."""
        order = {entry.name: place for place, entry in enumerate(self.sweep.trials if self.sweep else [])}
        names = [paths.root.name for paths in self._trial_paths()]
        return [self.trial(name) for name in sorted(names, key=lambda name: (order.get(name, len(order)), name))]

    def _trial_paths(self) -> list[TrialPaths]:
        folders = self.paths.trials.iterdir() if self.paths.trials.is_dir() else ()
        return [TrialPaths(each) for each in folders if each.is_dir() and not each.name.startswith(".")]

    def trial(self, name: str) -> Trial:
        """One trial, as far as it is."""
        paths, record = self.paths.trial(name), self.trial_record(name)
        return Trial(paths, record.trial if record else self._planned.get(name), record, self.log(name))

    def trial_record(self, name: str) -> TrialRecord | None:
        """How a trial ended; None: it has not, or the record is damaged."""
        with suppress(BadInput):
            return self.read_trial(name)
        return None

    def read_trial(self, name: str) -> TrialRecord | None:
        """How a trial ended; None: it has not.

        Raises:
            BadInput: the record is damaged.
        """
        file = self.paths.trial(name).record
        return _CACHE.get(file, lambda: from_json(TrialRecord, read_json(file), str(file))) if file.is_file() else None

    def log(self, name: str) -> MetricsLog:
        """What a trial has logged; a last line that is still being written is left out."""
        return _LOGS.read(self.paths.trial(name).metrics)

    @cached_property
    def _planned(self) -> dict[str, TrialConfig]:
        """Settings of the grid's trials by name: of trials that have not ended they are on record nowhere else."""
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
        """Write a record to its file, atomically; NaN and infinity are refused: they are never a result."""
        write_json(self.root / record.file, to_json(record))

    def write_trial(self, record: TrialRecord) -> None:
        """Put a trial's end on record."""
        write_json(self.paths.trial(record.name).record, to_json(record))

    def remember(self, **choices: Any) -> None:
        """Add to what was chosen for the run on its machine; a run without `environment.json` keeps nothing."""
        if (environment := self.environment) is None:
            return
        self.write(environment.model_copy(update={"choices": environment.choices.model_copy(update=choices)}))

    def mark_complete(self) -> None:
        """The last thing that a run writes."""
        write_atomic(self.paths.complete, datetime.now(UTC).isoformat(timespec="seconds") + "\n")

    def forget_half_written(self) -> None:
        """Remove what writes that were cut off have left behind."""
        for path in list(self.root.rglob(".*.tmp")):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def find_run(path: Path) -> tuple[Run, str | None] | None:
    """The run that lies in a folder, or whose trial does (`RUN/TRIAL` or `RUN/trials/TRIAL`), and the trial's name."""
    if (path / "config.yaml").is_file() or (path / "trials").is_dir():  # perhaps unfinished or damaged
        return Run(path), None
    above = path.parent if path.parent.name != "trials" else path.parent.parent
    if path.name and is_run(above) and RunPaths(above).trial(path.name).root.is_dir():
        return Run(above), path.name
    return None


def is_run(root: Path) -> bool:
    """Whether a run, finished or not, lies in a folder."""
    return (root / "config.yaml").is_file() and (root / "data.json").is_file()


def check_new(root: Path) -> None:
    """Raise BadInput where a run folder cannot be made because there is something."""
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise BadInput(f"--out {root}: already exists; choose another name, or remove it first (rm -r {root})")


# Caches ---------------------------------------------------------------------------------------------------------------


def _stamp(file: Path) -> tuple[int, int, int]:
    """What changes with the content; zeros where there is no file."""
    try:
        found = file.stat()
    except OSError:
        return 0, 0, 0
    return found.st_mtime_ns, found.st_size, found.st_ino


class _FileCache:
    """Parsed files by path, each in its last version alone: a page of fifty runs looks at hundreds."""

    def __init__(self, most: int = 1024) -> None:
        self._most, self._lock = most, Lock()
        self._kept: OrderedDict[Path, tuple[tuple[int, int, int], Any]] = OrderedDict()

    def get(self, file: Path, read: Callable[[], Any]) -> Any:
        """What `read` makes of a file; read again when the file has changed. Failures are not kept."""
        stamp = _stamp(file)
        with self._lock:
            known = self._kept.get(file)
            if known and known[0] == stamp:
                self._kept.move_to_end(file)
                return known[1]
        found = read()
        with self._lock:
            self._kept[file] = stamp, found
            self._kept.move_to_end(file)
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return found


@dataclass
class _Parsed:
    """As much of a `metrics.jsonl` as has been parsed."""

    stamp: tuple[int, int, int] = (0, 0, 0)
    size: int = 0
    digest: bytes = b""  # of the bytes up to `size`
    log: MetricsLog = field(default_factory=MetricsLog)


class _LogCache:
    """Metrics of trials, of which only what was added is parsed again: a live run is looked at every two seconds."""

    def __init__(self, most: int = 256) -> None:
        self._most, self._lock = most, Lock()
        self._kept: OrderedDict[Path, _Parsed] = OrderedDict()

    def read(self, file: Path) -> MetricsLog:
        """Everything that a file holds, but a last line without its end."""
        stamp = _stamp(file)
        with self._lock:
            known = self._kept.get(file, _Parsed())
            if known.stamp != stamp:
                known = self._kept[file] = _parse(file, stamp, known)
            if file in self._kept:
                self._kept.move_to_end(file)
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
            log = known.log
            return MetricsLog(list(log.steps), list(log.evaluations), log.unreadable)


def _parse(file: Path, stamp: tuple[int, int, int], known: _Parsed) -> _Parsed:
    """Add to what is known of a file; where the beginning has changed (a resumed trial's has), nothing is."""
    try:
        content = file.read_bytes()
    except OSError:
        return _Parsed(stamp)
    whole = content[: content.rfind(b"\n") + 1]
    if _digest(whole[: known.size]) != known.digest:
        known = _Parsed(digest=_digest(b""))
    for line in whole[known.size :].splitlines():
        try:
            known.log.add(parse_line(json.loads(line)))
        except (ValueError, ValidationError, TypeError):
            known.log.unreadable += 1
    return _Parsed(stamp, len(whole), _digest(whole), known.log)


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


_CACHE, _LOGS = _FileCache(), _LogCache()
