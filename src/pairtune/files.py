"""Atomic writes, fingerprints, and the user cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pairtune.errors import BadInput


def user_cache() -> Path:
    """The folder for data that can be regenerated: dequantised models, tokenized pairs, reference log-probs."""
    if explicit := os.environ.get("PAIRTUNE_CACHE"):
        return Path(explicit).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pairtune"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that replaces it when the block ends; after an error `path` is unchanged."""
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
    """Write a file atomically: a reader sees either the old content or the new, never a part of it."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        BadInput: the file is missing or not valid JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise BadInput(f"{path}: is not valid JSON; the file is damaged") from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, atomically; NaN and infinity raise ValueError, since no result contains them."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def fill_folder(path: Path, fill: Callable[[Path], None]) -> Path:
    """Replace the folder `path` with what `fill(temporary)` writes; on failure `path` is unchanged.

    If another process created the same folder in the meantime, ours replaces it: both are complete.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        fill(temporary)
        temporary.chmod(0o755)
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o644)  # some libraries write weights that only the owner can read
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def forget_oldest(folder: Path, keep_bytes: int) -> None:
    """Remove the least recently used entries of a cache folder until the rest takes at most `keep_bytes`.

    The most recently used entry stays, however large. The time of use is the folder's modification time; see
    `mark_used`. Folders that are still being filled (see `fill_folder`) are left alone.
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
    """Record that a cache entry has just been used."""
    with suppress(OSError):  # a read-only cache can still be used
        os.utime(entry)


def fingerprint(parts: Iterable[bytes | str]) -> str:
    """A short identifier of some content: 16 hex digits of SHA-256 over the parts, each prefixed with its length."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.hexdigest()[:16]


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def saved_fingerprint(folder: Path) -> str:
    """16 hex digits of SHA-256 over the weight files of a saved model, in order of their names."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
