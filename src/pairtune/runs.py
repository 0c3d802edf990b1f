"""The run folder: where everything of a run lies, and how it gets there without half-written files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pairtune.errors import BadInput


def user_cache() -> Path:
    """The folder for what can be made again: dequantised models, later tokens and reference log-probs."""
    if explicit := os.environ.get("PAIRTUNE_CACHE"):
        return Path(explicit).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pairtune"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends; after an error `path` is as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part of it."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, atomically. NaN and infinity are refused: they are never a result."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def fill_folder(path: Path, fill: Callable[[Path], None]) -> Path:
    """Replace the folder `path` by what `fill(temporary)` writes; a failure leaves `path` as it was.

    Where another process put the same folder there first, its folder is replaced by ours: both are complete.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        fill(temporary)
        temporary.chmod(0o755)
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o644)  # some libraries write weights that only their owner may read
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def forget_oldest(folder: Path, keep_bytes: int) -> None:
    """Remove the entries of a cache folder that were used longest ago until the rest holds at most `keep_bytes`.

    The last used entry stays, however large. An entry's time is that of its folder; see `mark_used`. Folders that are
    being filled (see `fill_folder`) are left alone.
    """
    finished = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    entries = sorted(finished, key=lambda path: path.stat().st_mtime)
    sizes = {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in entries}
    for path in entries[:-1]:
        if sum(sizes.values()) <= keep_bytes:
            return
        shutil.rmtree(path, ignore_errors=True)
        del sizes[path]


def mark_used(entry: Path) -> None:
    """Note that a cache entry was used now."""
    with suppress(OSError):  # a cache that cannot be written to can still be read
        os.utime(entry)


def fingerprint(parts: Iterable[bytes | str]) -> str:
    """A short name for a content: 16 hex digits of SHA-256 over the parts, each with its length before it."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.hexdigest()[:16]


def hash_file(path: Path) -> str:
    """64 hex digits of SHA-256 over a file's bytes."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def saved_fingerprint(folder: Path) -> str:
    """16 hex digits of SHA-256 over the weight files of a saved model, in name order."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run. Stages meet through these files, so each can be tested from a small fixture."""

    root: Path

    config = property(lambda self: self.root / "config.yaml")
    data = property(lambda self: self.root / "data.json")
    pairs = property(lambda self: self.root / "pairs.parquet")
    reference = property(lambda self: self.root / "reference")
    trials = property(lambda self: self.root / "trials")
    sweep = property(lambda self: self.root / "sweep.json")
    selection = property(lambda self: self.root / "selection.json")
    test = property(lambda self: self.root / "test.json")
    test_records = property(lambda self: self.root / "test.parquet")
    choosing = property(lambda self: self.root / "choosing.json")
    generations = property(lambda self: self.root / "generations.json")
    environment = property(lambda self: self.root / "environment.json")
    audit = property(lambda self: self.root / "audit.json")
    report = property(lambda self: self.root / "report.html")
    report_text = property(lambda self: self.root / "report.md")
    tensorboard = property(lambda self: self.root / "tensorboard")
    figures = property(lambda self: self.root / "figures")
    card = property(lambda self: self.root / "README.md")
    best = property(lambda self: self.root / "best")
    checkpoint = property(lambda self: self.root / "checkpoint.safetensors")
    complete = property(lambda self: self.root / "COMPLETE")

    @classmethod
    def create(cls, root: Path, write: Callable[[RunFolder], None]) -> RunFolder:
        """Make a new run folder, with what `write` puts there from the start.

        Raises:
            BadInput: `root` exists and is not an empty folder; nothing in it is touched.
        """
        cls.check_new(root)
        try:
            fill_folder(root, lambda temporary: write(cls(temporary)))
        except OSError as error:
            raise BadInput(f"--out {root}: cannot be created ({error.strerror})") from error
        return cls(root)

    @staticmethod
    def check_new(root: Path) -> None:
        """Raise BadInput where a run folder cannot be made because there is something."""
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise BadInput(f"--out {root}: already exists; choose another name, or remove it first (rm -r {root})")

    @classmethod
    def started(cls, root: Path) -> RunFolder:
        """Open a run that may be unfinished.

        Raises:
            BadInput: there is no run in this folder.
        """
        run = cls(root)
        if not run.config.is_file() or not run.data.is_file():
            raise BadInput(f"{root}: no run folder (no config.yaml and data.json in it)")
        return run

    def forget_half_written(self) -> None:
        """Remove what writes that were cut off have left behind."""
        for path in list(self.root.rglob(".*.tmp")):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    @classmethod
    def finished(cls, root: Path) -> RunFolder:
        """Open a run that may be served or read as a result.

        Raises:
            BadInput: there is no such folder, or it has no `COMPLETE`.
        """
        run = cls(root)
        if not root.is_dir():
            raise BadInput(f"{root}: no such run folder")
        if not run.complete.is_file():
            raise BadInput(f"{root}: the run is unfinished (no COMPLETE); `pairtune resume {root}` goes on with it")
        return run

    def choices(self) -> dict[str, Any]:
        """What was chosen for the run on its machine, from `environment.json`; empty for runs that did not keep it."""
        record: dict[str, Any] = self.read_json(self.environment) if self.environment.is_file() else {}
        return dict(record.get("choices", {}))

    def remember(self, **choices: Any) -> None:
        """Add to what was chosen for the run."""
        record = self.read_json(self.environment) if self.environment.is_file() else {}
        write_json(self.environment, record | {"choices": record.get("choices", {}) | choices})

    def trial(self, name: str) -> TrialFolder:
        """The folder of the trial called `name`."""
        return TrialFolder(self.trials / name)

    def read_json(self, path: Path) -> Any:
        """The content of one of this run's JSON files."""
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BadInput(f"{path}: cannot be read as JSON; the run folder is damaged") from error


@dataclass(frozen=True)
class TrialFolder:
    """Paths of one trial."""

    root: Path

    record = property(lambda self: self.root / "trial.json")
    metrics = property(lambda self: self.root / "metrics.jsonl")
    best = property(lambda self: self.root / "best")
    failed = property(lambda self: self.root / "failed")

    def evaluation(self, epoch: int) -> Path:
        """The per-example records of one epoch's evaluation, Parquet, one row per pair."""
        return self.root / "evals" / f"epoch-{epoch}.parquet"
