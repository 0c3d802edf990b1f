"""From what a person types after `--data` to rows.

A source is `bundled:concise`, a `.jsonl`, `.jsonl.gz` or `.parquet` file, or a Hub id with an optional split
(`Dahoas/rm-static@test`; without one, `train`).
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from pairtune.errors import BadInput, one_line

BUNDLED = "bundled:concise"
BUNDLED_SPLITS = ("train", "validation", "test")

# One row: its number (from 1; for text files the line number) and its content.
Row = tuple[int, Any]


def bundled_source(split: str) -> str:
    """The source name of one split of the bundled pairs."""
    return f"{BUNDLED}@{split}"


def read_rows(source: str, flag: str) -> Iterator[Row]:
    """Rows of a source, in its order.

    Raises:
        BadInput: the source does not exist, cannot be had, or is damaged; the message names `flag`, or file and line.
    """
    if source.startswith("bundled:"):
        yield from _read_bundled(source, flag)
    elif reader := _reader(source):
        path = Path(source).expanduser()
        if not path.is_file():
            raise BadInput(f"{flag} {source}: no such file")
        yield from reader(path)
    elif Path(source).expanduser().exists():
        raise BadInput(f"{flag} {source}: only {', '.join(_READERS)} files are read; convert it to one of these")
    else:
        yield from _read_hub(source, flag)


def _reader(source: str) -> Callable[[Path], Iterator[Row]] | None:
    return next((reader for ending, reader in _READERS.items() if source.lower().endswith(ending)), None)


def _read_bundled(source: str, flag: str) -> Iterator[Row]:
    name, _, split = source.partition("@")
    if name != BUNDLED or (split or "train") not in BUNDLED_SPLITS:
        raise BadInput(f"{flag} {source}: the bundled pairs are {BUNDLED}, splits {', '.join(BUNDLED_SPLITS)}")
    file = resources.files("pairtune.data") / "bundled" / "concise" / f"{split or 'train'}.jsonl"
    with resources.as_file(file) as path:
        yield from _read_jsonl(path)


def _read_jsonl(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _parse_line(path, number, line)
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path}: damaged after line {number} ({one_line(error)}); fetch the file again") from error


def _parse_line(path: Path, number: int, line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}:{number}: is not UTF-8 (byte {error.start}); save the file as UTF-8") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadInput(
            f"{path}:{number}: is not valid JSON ({one_line(error)}); one object a line is needed"
        ) from error


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"{path}: cannot be read as Parquet ({one_line(error)})") from error


def _read_hub(source: str, flag: str) -> Iterator[Row]:
    from datasets import load_dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    name, _, split = source.partition("@")
    try:
        rows = load_dataset(name, split=split or "train")
    except (OSError, ValueError, RuntimeError) as error:  # what datasets and its HTTP layers raise
        raise BadInput(
            f"{flag} {source}: neither a file here nor to be had from the Hub ({one_line(error, 160)}); "
            "check the name, the split after @ and the network"
        ) from error
    yield from enumerate(rows, 1)


_READERS = {".jsonl": _read_jsonl, ".jsonl.gz": _read_jsonl, ".parquet": _read_parquet}
