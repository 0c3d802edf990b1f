"""Reads one source: rows become pairs, and pairs become tokens, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from pairtune.config import Columns, SourceConfig
from pairtune.data.formats import RowParser
from pairtune.data.preference import BadRow, PreferencePair
from pairtune.data.sources import Source, SourceRow, open_source
from pairtune.data.tokens import TokenizedPair

_BATCH = 512

Encode = Callable[[Sequence[PreferencePair]], list[TokenizedPair | BadRow]]


@dataclass(eq=False)
class SourceReader:
    """A source that is being read."""

    config: SourceConfig
    source: Source
    parser: RowParser
    limit: int | None

    @classmethod
    def open(cls, config: SourceConfig, flag: str, columns: Columns, limit: int | None) -> SourceReader:
        """Find the source; see `open_source`. Its own columns override those given for all sources."""
        return cls(config, open_source(config, flag), RowParser(config.columns or columns), limit)

    @property
    def format(self) -> str | None:
        """The name of the format, once a pair has been read."""
        return self.parser.format.name if self.parser.format else None

    def parsed(self) -> Iterator[tuple[SourceRow, PreferencePair | BadRow]]:
        """Each row with its pair, or with the reason why it has none."""
        for row in self.source.rows(self.limit):
            try:
                yield row, self.parser.parse(row.content, f"{row.file}:{row.number}")
            except BadRow as fault:
                yield row, fault

    def encoded(self, encode: Encode) -> Iterator[list[tuple[SourceRow, TokenizedPair | BadRow]]]:
        """Every row with its pair tokenized by a method of `PairTokenizer`, in batches and in the source's order."""
        rows = self.parsed()
        while batch := list(islice(rows, _BATCH)):
            tokenized = iter(encode([pair for _, pair in batch if isinstance(pair, PreferencePair)]))
            yield [(row, next(tokenized) if isinstance(pair, PreferencePair) else pair) for row, pair in batch]


def describe_fault(row: SourceRow, fault: BadRow) -> str:
    """The file, row, field and message of a fault, on one line."""
    named = f" field {fault.field}" if fault.field else ""
    return f"{row.file}: row {row.number}:{named} {fault}"
