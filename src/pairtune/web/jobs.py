"""Processes that the site starts: `pairtune` commands that outlive the page and the site."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from django.conf import settings
from django.utils.text import slugify
from filelock import FileLock

from pairtune.run.records import Progress
from pairtune.web.models import Job

_LINES, _TAIL = 12, 4000
_ONE_AT_A_TIME = (("tune", "resume"),)  # kinds of which a subject has one process
_JUST_WRITTEN = 2.0  # seconds by which two notes of a process's start may differ


def start(kind: str, subject: str, arguments: Sequence[str], detail: str = "") -> Job:
    """Run a `pairtune` command in a process of its own, or find the one that a double click has started already.

    Args:
        kind: see `Job`.
        subject: see `Job`.
        arguments: the command and its arguments.
        detail: see `Job`.
    """
    root: Path = settings.PAIRTUNE_SITE / "jobs"
    root.mkdir(parents=True, exist_ok=True)
    alone = next((kinds for kinds in _ONE_AT_A_TIME if kind in kinds), ())
    with FileLock(root / ".lock"):
        running = last(alone, subject) if alone else None
        if running and is_alive(running):
            return running
        return _start(root, kind, subject, arguments, detail)


def _start(root: Path, kind: str, subject: str, arguments: Sequence[str], detail: str) -> Job:
    folder = Path(tempfile.mkdtemp(prefix=f"{kind}-{slugify(subject)[:40]}-", dir=root))
    with (folder / "out").open("wb") as out, (folder / "log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603 - our own command
            [sys.executable, "-m", "pairtune", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=log,
            start_new_session=True,
        )
    born = psutil.Process(process.pid).create_time()
    return Job.objects.create(kind=kind, subject=subject, detail=detail, pid=process.pid, born=born, folder=str(folder))


def last(kinds: Sequence[str], subject: str) -> Job | None:
    """The last job of some kinds for a subject."""
    return Job.objects.filter(kind__in=kinds, subject=subject).last()


def is_alive(job: Job | Progress) -> bool:
    """Whether the process of a job, or of a run that was started elsewhere on this machine, is still running."""
    return _process(job) is not None


def stop(job: Job | Progress) -> None:
    """Ask a process to stop: a run ends after its step, with a checkpoint."""
    if process := _process(job):
        process.terminate()  # not an interrupt, which a site started in the background ignores and passes on


def resources(job: Job | Progress) -> tuple[float, float] | None:
    """Memory in GB and processors in use of a process, averaged over its life; None if it has ended."""
    process = _process(job)
    if process is None:
        return None
    try:
        with process.oneshot():
            times, age = process.cpu_times(), max(1.0, time.time() - process.create_time())
            return process.memory_info().rss / 2**30, (times.user + times.system) / age
    except psutil.Error:
        return None


def _process(job: Job | Progress) -> psutil.Process | None:
    try:
        process = psutil.Process(job.pid)
        alive = abs(process.create_time() - job.born) < _JUST_WRITTEN and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return None
    return process if alive else None


def output(job: Job) -> str:
    """What the command has written to its standard output."""
    file = Path(job.folder) / "out"
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def tail(job: Job) -> str:
    """The last lines of what the command has said."""
    file = Path(job.folder) / "log"
    if not file.is_file():
        return ""
    with file.open("rb") as log:
        log.seek(max(0, file.stat().st_size - _TAIL))
        return "\n".join(log.read().decode(errors="replace").splitlines()[-_LINES:])


def complaint(job: Job) -> str:
    """Why a command that has ended failed: its last line, without the word that precedes it."""
    lines = tail(job).splitlines()
    return lines[-1].removeprefix("error: ") if lines else ""
