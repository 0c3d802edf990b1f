"""One writer at a time for a run folder: a lock that ends with the process that holds it, however that ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from pairtune.errors import BadInput
from pairtune.run.folder import Run

LOCK = ".lock"


@contextmanager
def writing(run: Run) -> Iterator[None]:
    """Hold the lock of a run's folder, which must exist; it stays held if the folder is renamed.

    Raises:
        BadInput: another process holds it.
    """
    lock = FileLock(run.root / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        progress = run.progress
        holder = f"process {progress.pid}" if progress and progress.pid else "another process"
        raise BadInput(f"{run.root}: {holder} is working on this run; wait until it has ended, or stop it") from error
    try:
        yield
    finally:
        lock.release()
