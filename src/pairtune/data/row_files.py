"""Reads rows from files: JSON lines, JSON arrays, CSV and Parquet, plain or compressed, without loading whole files.

A single damaged row (a broken line, bytes that are not UTF-8) is yielded as a `BadRow` in its place, so that the caller
decides what to do. Damage that hides how many rows follow (a truncated archive) stops the reading.
"""

from __future__ import annotations

import ast
import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

from pairtune.data.preference import BadRow
from pairtune.errors import BadInput, one_line

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

# One row: its number (from 1; for JSON lines the line number) and its content, or what is wrong with it.
Row = tuple[int, Any]

_COMPRESSIONS = (".gz", ".zst")
_BLOCK = 1 << 20
# Bytes of a line, or characters of an array item or of a row of CSV, above which it is no pair: some four million
# tokens. A compressed file of a few hundred KB can hold a line that fills the memory.
_LARGEST_ROW = 16 << 20
# Rows of Parquet that are unpacked at once: a text that is stored once may be in all of them.
_PARQUET_ROWS = 16
_TOO_LONG = f"is longer than {_LARGEST_ROW >> 20} MiB"


def is_data_file(path: str | Path) -> bool:
    """Whether `read_file` supports the file's extension."""
    return _reader(path) is not None


def read_file(path: Path) -> Iterator[Row]:
    """The rows of a file, in order.

    Raises:
        BadInput: the file is so damaged that further rows cannot be read; the message names file and row.
    """
    reader = _reader(path)
    if reader is None:
        raise BadInput(
            f"{path}: only {', '.join(ENDINGS)} files can be read (also .gz and .zst); convert it to one of them"
        )
    _refuse_pointer(path)
    number = 0
    try:
        for number, row in reader(path):
            yield number, row
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path}: damaged after row {number} ({one_line(error)}); download the file again") from error


_POINTER = b"version https://git-lfs.github.com/spec/"


def _refuse_pointer(path: Path) -> None:
    """Refuse what a clone without Git LFS leaves in a data file's place.

    Raises:
        BadInput: the file is such a pointer.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from error
    if start == _POINTER:
        raise BadInput(f"{path}: is a Git LFS pointer, not the data; run `git lfs pull` in its repository")


def _reader(path: str | Path) -> Callable[[Path], Iterator[Row]] | None:
    name = str(path).lower()
    for ending in _COMPRESSIONS:
        name = name.removesuffix(ending)
    if name != str(path).lower() and name.endswith(".parquet"):
        return None  # Parquet is compressed internally; its reader needs the plain file
    return next((reader for ending, reader in _READERS.items() if name.endswith(ending)), None)


def _open(path: Path) -> BinaryIO:
    name = path.name.lower()
    if name.endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if name.endswith(".zst"):
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"), _BLOCK)
    return path.open("rb")


def _read_json_lines(path: Path) -> Iterator[Row]:
    with _open(path) as lines:
        number = 0
        while line := lines.readline(_LARGEST_ROW):
            number += 1
            if len(line) == _LARGEST_ROW and not line.endswith(b"\n"):
                while (rest := lines.readline(_BLOCK)) and not rest.endswith(b"\n"):
                    pass
                yield number, BadRow("too long", "", f"{_TOO_LONG}; a row is one pair")
            elif line.strip():
                yield number, _parse_line(number, line)


def _parse_line(number: int, line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return BadRow("not UTF-8", "", f"is not UTF-8 (byte {error.start + 1}); save the file as UTF-8")
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        return BadRow("not valid JSON", "", f"is not valid JSON ({one_line(error)}); write one object per line")


def _read_json(path: Path) -> Iterator[Row]:
    """A `.json` file holds one array of rows or, as many tools write it, JSON lines."""
    with _open(path) as file:
        start = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start[:1] != b"[":
        yield from _read_json_lines(path)
        return
    with _open(path) as file:
        try:
            yield from enumerate(_array_items(path, io.TextIOWrapper(file, encoding="utf-8-sig")), 1)
        except UnicodeDecodeError as error:
            raise BadInput(f"{path}: is not UTF-8 ({one_line(error)}); save the file as UTF-8") from error


def _array_items(path: Path, text: TextIO) -> Iterator[Any]:
    """The items of a JSON array, read block by block.

    The standard decoder takes one item off the front of the text read so far; if that fails, the item may continue in
    the next block. Streaming parsers exist, but the fast ones turn lone surrogates into question marks.
    """
    decoder = json.JSONDecoder()
    held, row = text.read(_BLOCK).lstrip()[1:], 0
    while True:
        while not (held := held.lstrip()):
            held = text.read(_BLOCK)
            if not held:
                raise BadInput(f"{path}: ends after row {row} without a closing ]; download the file again")
        if held[0] == "]":
            if (held[1:] + text.read(_BLOCK)).strip():
                raise BadInput(
                    f"{path}: goes on after the ] that ends its rows; write one array, or one object per line"
                )
            return
        row += 1
        item, held = _take_item(f"{path}: row {row}", decoder, text, held[1:] if row > 1 else held)
        yield item


def _take_item(where: str, decoder: json.JSONDecoder, text: TextIO, held: str) -> tuple[Any, str]:
    """The first item of the text in `held`, and the text after it, which begins with a comma or a ]."""
    while True:
        held = held.lstrip()
        try:
            item, end = decoder.raw_decode(held)
            rest = held[end:].lstrip()
            if rest[:1] in (",", "]"):  # otherwise it may be the beginning of a longer number
                return item, rest
            fault = "a comma or ] is missing after it"
        except (ValueError, RecursionError) as error:
            fault = one_line(error)
        if len(held) >= _LARGEST_ROW:
            raise BadInput(
                f"{where}: {_TOO_LONG}, or is not valid JSON ({fault}); correct it, since later rows cannot be read"
            )
        block = text.read(max(_BLOCK, len(held)))
        if not block:
            raise BadInput(f"{where}: is not valid JSON ({fault}); correct it, since later rows cannot be read")
        held += block


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(_LARGEST_ROW)  # the default limit is 128 KB per cell
    with _open(path) as file:
        # Bytes that are not UTF-8 become lone surrogates, which are rejected row by row when texts are checked.
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        lines = _Lines(text)
        rows = csv.DictReader(lines, restkey="", strict=True)
        number = 0
        try:
            _check_names(path, rows.fieldnames or [])
        except csv.Error as error:
            raise BadInput(f"{path}: its header is not valid CSV ({one_line(error)})") from error
        while True:
            number += 1
            lines.row = 0
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                raise BadInput(f"{path}: row {number}: is not valid CSV ({one_line(error)})") from error
            yield number, _whole_row(row, len(rows.fieldnames or []))


class _Lines:
    """The lines of a text, for the `csv` module, which otherwise takes a row of any length into memory.

    Attributes:
        row: characters of the row that is being read; to be set to 0 before each row.
    """

    def __init__(self, text: TextIO) -> None:
        self._text, self.row = text, 0

    def __iter__(self) -> Iterator[str]:
        while line := self._text.readline(_LARGEST_ROW):
            self.row += len(line)
            if self.row >= _LARGEST_ROW:
                raise csv.Error(f"{_TOO_LONG}; a quote may be missing")
            yield line


def _check_names(path: Path, names: Iterable[str]) -> None:
    """Make sure that no column hides another one.

    Raises:
        BadInput: two columns have the same name.
    """
    name, times = next(iter(Counter(names).most_common(1)), ("", 0))
    if times > 1:
        raise BadInput(f"{path}: has {times} columns called {name!r}; give each a name of its own")


def _whole_row(row: dict[str, Any], columns: int) -> Any:
    if "" in row and isinstance(row[""], list):
        return BadRow("too many cells", "", f"has more cells than the {columns} of the header; quote cells with commas")
    if None in row.values():
        return BadRow("too few cells", "", f"has fewer cells than the {columns} of the header")
    turns = {name: read for name, value in row.items() if (read := _turns_in(value)) is not None}
    return {**row, **turns} if turns else row


def _turns_in(cell: str) -> Any:
    """The list of turns that a cell holds as JSON or as Python wrote it; None if it is an ordinary text."""
    if not cell.lstrip().startswith("[{") or not any(f"{quote}role{quote}" in cell for quote in "'\""):
        return None
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return read(cell)
    return None


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _check_names(path, file.schema_arrow.names)
            _check_row_groups(path, file.metadata)
            number = 0
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for row in _rows_of(batch):
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise BadInput(f"{path}: cannot be read as Parquet ({one_line(error)})") from error


def _check_row_groups(path: Path, metadata: pq.FileMetaData) -> None:
    """Refuse a file that says itself that it unpacks to rows far beyond the limit, before any is unpacked.

    Raises:
        BadInput: the rows of a group are too long on average.
    """
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        if group.total_byte_size > _LARGEST_ROW * max(1, group.num_rows):
            raise BadInput(f"{path}: an average row of row group {number + 1} {_TOO_LONG}; a row is one pair")


def _rows_of(batch: pa.RecordBatch) -> Iterator[Any]:
    """The rows of a batch; one that is too long, or has bytes that are not UTF-8, fails alone."""
    rows = None
    if batch.nbytes < _LARGEST_ROW:
        with suppress(UnicodeDecodeError):
            rows = batch.to_pylist()
    return iter(rows) if rows is not None else (_row_of(batch.slice(at, 1)) for at in range(batch.num_rows))


def _row_of(row: pa.RecordBatch) -> Any:
    if row.nbytes >= _LARGEST_ROW:
        return BadRow("too long", "", f"{_TOO_LONG}; a row is one pair")
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as error:
        return BadRow("not UTF-8", "", f"is not UTF-8 (byte {error.start + 1}); write its texts as UTF-8")


_READERS = {".jsonl": _read_json_lines, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
ENDINGS = tuple(_READERS)
