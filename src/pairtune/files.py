"""Atomic writes, fingerprints, and the user cache."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pairtune.errors import BadInput

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# macOS: what else reaches the disk stays in its cache, which a power cut empties.
_FULL_SYNC: int | None = getattr(fcntl, "F_FULLFSYNC", None)

# What new files are not allowed to be, as the user has set it. It can only be read by setting it, which is safe before
# there are threads.
_UMASK = os.umask(0o022)
os.umask(_UMASK)


def user_cache() -> Path:
    """The folder for data that can be regenerated: dequantised models, tokenized pairs, reference log-probs."""
    if explicit := os.environ.get("PAIRTUNE_CACHE"):
        return typed_path(explicit)
    return typed_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "pairtune"


def typed_path(name: str) -> Path:
    """The path that a person means; `~NAME` stays as it is if there is no such user, where Path.expanduser raises."""
    return Path(os.path.expanduser(name))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that replaces it when the block ends; after an error `path` is unchanged.

    File and folder are synced: what has been replaced survives a power cut, and so does all that was replaced before.
    """
    make_folder(path.parent)
    with _naming(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        sync(temporary)
        temporary.chmod(0o666 & ~_UMASK)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let errors name the path that was meant, not a temporary one beside it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync(path: Path) -> None:
    """Have the disk hold a file's content, or a folder's names; Windows and some file systems cannot do the latter."""
    if fcntl is None and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if fcntl else os.O_RDWR)  # Windows syncs only what may be written
    try:
        if _FULL_SYNC is not None:
            with suppress(OSError):  # file systems that cannot do it are synced as elsewhere
                fcntl.fcntl(handle, _FULL_SYNC)
                return
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Create a folder and those above it, unless they exist, so that they survive a power cut."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync(each.parent)


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
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
        if _HALF_PAIR.search(text):
            json.dumps(value, ensure_ascii=False).encode()  # fails if it is one, which no page or file could contain
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: is not valid JSON; the file is damaged") from error
    return value


_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # perhaps half of a surrogate pair


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, atomically; NaN and infinity raise ValueError, since no result contains them."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def fill_folder(path: Path, fill: Callable[[Path], None], *, new: bool = False) -> Path:
    """Replace the folder `path` with what `fill(temporary)` writes; on failure `path` is unchanged.

    The old folder is moved aside before the new one takes its place, and removed afterwards; `restore_moved` undoes
    this for a process that was killed in between. If another process created the same folder in the meantime, ours
    replaces it: both are complete.

    Args:
        path: the folder.
        fill: writes the content into the folder that it is given.
        new: refuse to replace a folder that is not empty.

    Raises:
        OSError: the folder cannot be written; with `new`, ENOTEMPTY or EEXIST if there is one.
    """
    make_folder(path.parent)
    with _naming(path):
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        fill(temporary)
        for file in (*temporary.rglob("*"), temporary):
            file.chmod((0o777 if file.is_dir() else 0o666) & ~_UMASK)  # some libraries' weights are the owner's only
            sync(file)
        if new or not path.exists():
            os.replace(temporary, path)
        else:
            moved = Path(f"{temporary.with_suffix('')}{_MOVED}")
            os.replace(path, moved)
            try:
                os.replace(temporary, path)
            except OSError:
                os.replace(moved, path)
                raise
            shutil.rmtree(moved, ignore_errors=True)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


_MOVED = ".old"  # a folder that `fill_folder` is replacing: .NAME.xxxxxxxx.old


def restore_moved(folder: Path) -> None:
    """Move back, anywhere in `folder`, what a killed `fill_folder` had moved aside without putting anything there."""
    for moved in list(folder.rglob(f".*{_MOVED}")):
        path = moved.with_name(moved.name.removeprefix(".").removesuffix(_MOVED).rpartition(".")[0])
        if path.exists():
            shutil.rmtree(moved, ignore_errors=True)
        else:
            os.replace(moved, path)


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


def fingerprint(parts: Iterable[bytes | memoryview | str]) -> str:
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
        with file.open("rb") as content:
            hashlib.file_digest(content, lambda: digest)
    return digest.hexdigest()[:16]
