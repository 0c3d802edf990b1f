"""From what the user types after `--data` to rows.

A source is a file, a folder of files with an optional split (`pairs/@train`), `bundled:concise`, or a Hub id with an
optional subset, split and revision (`Dahoas/rm-static@test#v1.0`, `org/name:subset@train`; without a split, `train`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pairtune.config import SourceConfig
from pairtune.data.row_files import ENDINGS, is_data_file, read_file
from pairtune.errors import BadInput, one_line
from pairtune.files import fingerprint, hash_file, typed_path

BUNDLED = "bundled:concise"
BUNDLED_SPLITS = ("train", "validation", "test")

# Files that other tools put beside the data; they hold settings and descriptions, not rows.
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json"}


@dataclass(frozen=True)
class SourceRow:
    """One row as it was read.

    Attributes:
        file: the name of the file, or of the source if it is not a file.
        number: counted from 1; for JSON lines, the line number.
        content: the row, or a `BadRow` if it could not be read.
        further: whether this stands for a pair after the first of its row.
    """

    file: str
    number: int
    content: Any
    further: bool = False


@dataclass(frozen=True)
class Source:
    """A source that was found to exist.

    Attributes:
        name: as the user typed it.
        files: the files to read, each with the name that its rows are reported under; empty for a Hub dataset.
        hub: the Hub dataset, or None.
    """

    name: str
    files: tuple[tuple[str, Path], ...] = ()
    hub: _HubData | None = None

    def rows(self, limit: int | None = None) -> Iterator[SourceRow]:
        """At most `limit` rows, in the order of the source.

        Raises:
            BadInput: the source cannot be loaded or is damaged; the message names file and row.
        """
        yield from islice(self._all_rows(limit), limit)

    def _all_rows(self, limit: int | None) -> Iterator[SourceRow]:
        if self.hub:
            for number, row in enumerate(self.hub.rows(limit), 1):
                yield SourceRow(self.name, number, row)
        for name, path in self.files:
            for number, row in read_file(path):
                yield SourceRow(name, number, row)

    def fingerprint(self) -> str:
        """A fingerprint of the content: of every byte of the files, or of the Hub revision."""
        if self.hub:
            return self.hub.fingerprint()
        return fingerprint(part for name, path in self.files for part in (name, hash_file(path)))


def open_source(config: SourceConfig, flag: str) -> Source:
    """Find a source.

    Raises:
        BadInput: it does not exist, is of an unsupported kind, or has no such split; the message names `flag`.
    """
    name = config.source
    where = f"{flag} {name}"
    if name.startswith("bundled:"):
        return _open_bundled(name, where)
    path = typed_path(name)
    if path.is_file():
        if not is_data_file(path):
            raise BadInput(
                f"{where}: only {', '.join(ENDINGS)} files can be read (also .gz and .zst); convert it to one of them"
            )
        return Source(name, ((name, path),))
    folder, _, split = name.rpartition("@") if "@" in name else (name, "", "")
    if typed_path(folder).is_dir():
        return _open_folder(name, typed_path(folder), split, where)
    if typed_path(folder).is_file():
        raise BadInput(f"{where}: a file has no splits; omit @{split}")
    if is_data_file(name) or name.startswith((".", "/", "~")):
        raise BadInput(f"{where}: no such file or folder")
    return Source(name, hub=_HubData.parse(name, where))


def bundled_source(split: str) -> SourceConfig:
    """One split of the bundled pairs."""
    return SourceConfig(source=f"{BUNDLED}@{split}")


def _open_bundled(name: str, where: str) -> Source:
    bundle, _, split = name.partition("@")
    if bundle != BUNDLED or (split or "train") not in BUNDLED_SPLITS:
        raise BadInput(f"{where}: the bundled pairs are {BUNDLED}, splits {', '.join(BUNDLED_SPLITS)}")
    return Source(name, ((name, Path(__file__).parent / "bundled" / "concise" / f"{split or 'train'}.jsonl"),))


def _open_folder(name: str, folder: Path, split: str, where: str) -> Source:
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and is_data_file(path)
        and path.name not in _NOT_DATA
        and not path.name.endswith(".edits.json")  # names its source; `data.edits`
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not found:
        raise BadInput(f"{where}: no {', '.join(ENDINGS)} file in this folder")
    # A split is a word in the name of a file or folder: train.jsonl, train-00000-of-00002.parquet, train/part.csv
    word = re.compile(rf"(^|[/._-]){re.escape(split)}([/._-]|$)")
    chosen = [path for path in found if not split or word.search(path.relative_to(folder).as_posix())]
    if not chosen:
        have = ", ".join(path.relative_to(folder).as_posix() for path in found[:5])
        raise BadInput(f"{where}: no file in this folder is named after the split {split} (found {have})")
    return Source(name, tuple((os.path.join(folder, path.relative_to(folder)), path) for path in chosen))


@dataclass(frozen=True)
class _HubData:
    """A dataset on the Hub, loaded with `datasets`."""

    name: str
    subset: str | None
    split: str
    revision: str | None
    where: str

    @classmethod
    def parse(cls, name: str, where: str) -> _HubData:
        found = re.fullmatch(r"([\w.-]+(?:/[\w.-]+)?)(?::([^@#]+))?(?:@([\w.-]+))?(?:#(.+))?", name)
        if not found:
            raise BadInput(f"{where}: neither a file nor a Hub id; Hub ids look like org/name:subset@split#revision")
        dataset, subset, split, revision = found.groups()
        return cls(dataset, subset, split or "train", revision, where)

    def rows(self, limit: int | None) -> Iterator[Any]:
        # A few rows are streamed; a whole split is downloaded once and then memory-mapped from the cache.
        from huggingface_hub.constants import HF_HUB_OFFLINE

        yield from self._load(streaming=limit is not None and not HF_HUB_OFFLINE)

    def fingerprint(self) -> str:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        parts = [self.name, self.subset or "", self.split]
        try:
            revision = HfApi().dataset_info(self.name, revision=self.revision).sha or ""
        except (OSError, ValueError, RuntimeError, HfHubHTTPError, OfflineModeIsEnabled):
            revision = self._load(streaming=False)._fingerprint  # offline: what the cache holds
        return fingerprint([*parts, revision])

    def _load(self, *, streaming: bool) -> Any:
        from datasets import load_dataset
        from datasets.utils.logging import disable_progress_bar

        disable_progress_bar()
        try:
            return load_dataset(self.name, self.subset, split=self.split, revision=self.revision, streaming=streaming)
        except (OSError, ValueError, RuntimeError) as error:  # what datasets and its HTTP layers raise
            raise BadInput(
                f"{self.where}: not a local file, and cannot be loaded from the Hub ({one_line(error, 160)}); "
                "check the name, the split after @ and the network"
            ) from error
