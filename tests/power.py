"""A disk that loses power: what a program has written is there afterwards only as far as it was synced.

The most that POSIX lets a file system lose is lost: a file has the content of its last `fsync`, or none, and a folder
the names of its last `fsync`, whatever was renamed or removed since. Real ones lose less.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest


class Disk:
    """What would be left of a folder after a power cut now; made while `os.fsync` is replaced.

    Args:
        root: a folder that is on the disk, as it is, to begin with.
        patch: replaces `os.fsync`.
        synced: called after each `fsync`.
    """

    def __init__(self, root: Path, patch: pytest.MonkeyPatch, synced: Callable[[Disk], None]) -> None:
        self.root, self._synced = root, synced
        self._contents: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        self._folders: set[int] = set()
        self._open: list[int] = []  # so that no inode's number is used again
        self._keep(os.open(root, os.O_RDONLY))
        self._fsync = os.fsync
        patch.setattr(os, "fsync", self._sync)

    def _sync(self, handle: int) -> None:
        self._fsync(handle)
        if str(self.root) in os.readlink(f"/proc/self/fd/{handle}"):
            self._keep(os.open(f"/proc/self/fd/{handle}", os.O_RDONLY))
            self._synced(self)

    def _keep(self, handle: int) -> None:
        self._open.append(handle)
        status = os.fstat(handle)
        if not stat.S_ISDIR(status.st_mode):
            self._contents[status.st_ino] = Path(f"/proc/self/fd/{handle}").read_bytes()
            return
        self._folders.add(status.st_ino)
        with os.scandir(handle) as entries:
            found = {entry.name: entry.stat(follow_symlinks=False) for entry in entries}
        self._names[status.st_ino] = {name: each.st_ino for name, each in found.items()}
        self._folders |= {each.st_ino for each in found.values() if stat.S_ISDIR(each.st_mode)}

    def left(self, to: Path) -> Path:
        """Write what would be left into a new folder."""
        self._write(to, os.stat(self.root).st_ino)
        return to

    def _write(self, to: Path, folder: int) -> None:
        to.mkdir()
        for name, number in self._names.get(folder, {}).items():
            if number in self._folders:
                self._write(to / name, number)
            else:
                (to / name).write_bytes(self._contents.get(number, b""))

    def close(self) -> None:
        for handle in self._open:
            os.close(handle)


def without_times(root: Path) -> dict[str, bytes]:
    """A run's weights, metrics and per-pair records: what an interruption must not change."""
    kept = (*root.rglob("metrics.jsonl"), *root.rglob("*.safetensors"), *root.rglob("examples*.parquet"))
    return {str(path.relative_to(root)): path.read_bytes() for path in kept if "reference" not in path.parts}


def forget(path: Path) -> None:
    """Remove a folder, if there is one."""
    shutil.rmtree(path, ignore_errors=True)
