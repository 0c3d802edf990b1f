"""Parsed files of run folders, parsed again only when they have changed."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from pydantic import ValidationError

from pairtune.run.metrics import MetricsLog, parse_line


def _stamp(file: Path) -> tuple[int, int, int]:
    """Changes whenever the file's content changes; zeros if there is no file."""
    try:
        found = file.stat()
    except OSError:
        return 0, 0, 0
    return found.st_mtime_ns, found.st_size, found.st_ino


class FileCache:
    """Parsed files by path, only the latest version of each; a page with fifty runs reads hundreds of files."""

    def __init__(self, most: int = 1024) -> None:
        self._most, self._lock = most, Lock()
        self._kept: OrderedDict[Path, tuple[tuple[int, int, int], Any]] = OrderedDict()

    def get(self, file: Path, read: Callable[[], Any]) -> Any:
        """The result of `read`, called again only if the file has changed. Failures are not cached."""
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
    """The part of a `metrics.jsonl` that has been parsed."""

    stamp: tuple[int, int, int] = (0, 0, 0)
    size: int = 0
    digest: bytes = b""  # of the bytes up to `size`
    log: MetricsLog = field(default_factory=MetricsLog)


class LogCache:
    """Metrics of trials; only added lines are parsed, since a live run is polled every two seconds."""

    def __init__(self, most: int = 256) -> None:
        self._most, self._lock = most, Lock()
        self._kept: OrderedDict[Path, _Parsed] = OrderedDict()

    def read(self, file: Path) -> MetricsLog:
        """All of a file, except an incomplete last line."""
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
    """Parse what was added to a file, or all of it if its beginning has changed (as in a resumed trial)."""
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
