"""Converts any source to a file in TRL's conversational format, which all common trainers read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pairtune.config import OnBadRow
from pairtune.data.preference import BadRow, RowCount
from pairtune.data.source_reader import SourceReader, stop_at
from pairtune.data.sources import SourceRow
from pairtune.data.table import write_table
from pairtune.data.tokens import PairTokenizer, TokenizedPair
from pairtune.errors import BadInput
from pairtune.files import replacing

CONVERTED = (".jsonl", ".parquet")
_BATCH = 1024


def convert_source(reader: SourceReader, out: Path, on_bad_row: OnBadRow) -> RowCount:
    """Write a source's pairs to `out`, atomically.

    Returns:
        The count of rows kept and dropped.

    Raises:
        BadInput: `out` is not a `.jsonl` or `.parquet` file or already exists, or a row cannot be used and
            `on_bad_row` is stop.
    """
    write = {".jsonl": _write_json_lines, ".parquet": _write_parquet}.get(out.suffix.lower())
    if write is None:
        raise BadInput(f"{out}: should end in {' or '.join(CONVERTED)}")
    if out.exists():
        raise BadInput(f"{out}: already exists; choose another name or remove it first")
    if not out.parent.is_dir():
        raise BadInput(f"{out}: there is no folder {out.parent}; create it first")
    count = RowCount(reader.source.name, "all")

    with replacing(out) as temporary:
        write(temporary, conversational_rows(reader, count, on_bad_row))
        if not count.kept:
            raise BadInput(
                f"{reader.source.name}: no row is a usable pair ({', '.join(count.dropped) or 'it is empty'})"
            )
    return count


def conversational_rows(reader: SourceReader, count: RowCount, on_bad_row: OnBadRow) -> Iterator[dict[str, Any]]:
    """A source's pairs, or single answers, in TRL's conversational format with their `origin`; `count` counts the rows.

    Raises:
        BadInput: a row cannot be used and `on_bad_row` is stop.
    """
    for row, result in reader.parsed():
        if isinstance(result, BadRow):
            _drop(count, row, result, on_bad_row)
            continue
        count.keep(shortened=False, further=row.further)
        yield {**result.conversational(), "origin": result.origin}


def tokenize_source(
    reader: SourceReader, tokenizer: Any, max_length: int, on_bad_row: OnBadRow, path: Path
) -> RowCount:
    """Write all pairs of a source to one table (see `table.write_table`), for evaluations, which need no splits.

    Returns:
        The count of rows kept and dropped.

    Raises:
        BadInput: a row cannot be used and `on_bad_row` is stop.
    """
    count = RowCount(reader.source.name, "all")

    def batches() -> Iterator[list[TokenizedPair]]:
        for batch in reader.encoded(PairTokenizer(tokenizer, max_length).encode):
            kept = []
            for row, result in batch:
                if isinstance(result, BadRow):
                    _drop(count, row, result, on_bad_row)
                    continue
                count.keep(shortened=result.turns_cut > 0, further=row.further)
                kept.append(result)
            yield kept

    write_table(path, batches())
    return count


def _drop(count: RowCount, row: SourceRow, fault: BadRow, on_bad_row: OnBadRow) -> None:
    if on_bad_row == "stop":
        stop_at(row, fault)
    count.drop(fault.reason, further=row.further)


def _write_json_lines(path: Path, pairs: Iterator[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)


def _write_parquet(path: Path, pairs: Iterator[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    columns = {"prompt": turns, "chosen": turns, "rejected": turns, "origin": pa.string()}
    first = list(islice(pairs, 1))
    if first and "completion" in first[0]:
        columns = {"prompt": turns, "completion": turns, "label": pa.bool_(), "origin": pa.string()}
    schema, rest = pa.schema(columns), chain(first, pairs)
    with pq.ParquetWriter(path, schema) as writer:
        while batch := list(islice(rest, _BATCH)):
            for pair in batch:
                if pair.keys() - schema.names or any(turn.keys() > {"role", "content"} for turn in _turns(pair)):
                    raise BadInput(f"{pair['origin']}: has tools or thinking, which only .jsonl can hold; write .jsonl")
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))


def _turns(pair: dict[str, Any]) -> list[dict[str, Any]]:
    return [turn for part in ("prompt", "chosen", "rejected", "completion") for turn in pair.get(part, [])]
