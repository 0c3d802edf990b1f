"""Reads one source: rows become pairs, and pairs become tokens, batch by batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TYPE_CHECKING

from pairtune.config import OnBadRow, Reading, SourceConfig
from pairtune.data.columns import HEAD
from pairtune.data.conversations import is_empty
from pairtune.data.edits import EditList, edited, is_edit_list, read_edits
from pairtune.data.judged_rows import label_key
from pairtune.data.preference import BadRow, LeftOut, PreferencePair
from pairtune.data.row_parser import Parsed, RowParser, halved, refuse_unknown
from pairtune.data.sources import Source, SourceRow, open_source
from pairtune.errors import BadInput
from pairtune.files import fingerprint, typed_path

if TYPE_CHECKING:
    from pairtune.data.formats import Format
    from pairtune.data.tokens import TokenizedPair

_BATCH = 512
# Rows whose labels are counted to learn what their values mean.
_LABEL_ROWS = 100_000

Encode = Callable[[Sequence[PreferencePair]], "list[TokenizedPair | BadRow]"]


@dataclass(eq=False)
class SourceReader:
    """A source that is being read."""

    config: SourceConfig
    source: Source
    parser: RowParser
    limit: int | None
    where: str
    edits: EditList | None = None

    @classmethod
    def open(cls, config: SourceConfig, flag: str, reading: Reading, limit: int | None) -> SourceReader:
        """Find the source, or that of an edit list; see `open_source`. Its own columns override those for all."""
        if config.columns:
            reading = replace(reading, columns=config.columns)
        where, edits = f"{flag} {config.source}", None
        if is_edit_list(config.source):
            edits = read_edits(typed_path(config.source), where)
            source = replace(open_source(SourceConfig(source=edits.source), where), name=config.source)
        else:
            source = open_source(config, flag)
        return cls(config, source, RowParser(reading, config.source), limit, where, edits)

    @property
    def format(self) -> str | None:
        """The name of the format, once a pair has been read."""
        return self.parser.format.name if self.parser.format else None

    @property
    def better(self) -> str:
        """Which answer is taken for the better one, and why; empty until a pair has been read."""
        return self.parser.format.better if self.parser.format else ""

    def fingerprint(self) -> str:
        """A fingerprint of the source's content and of the edits."""
        found = self.source.fingerprint()
        return fingerprint([found, self.edits.model_dump_json()]) if self.edits else found

    def probe(self, on_bad_row: OnBadRow = "skip") -> Format | None:
        """Read the first rows of a local source, so that what cannot be read is refused before anything else starts.

        Returns:
            Their format; None if there is no row, or the source is not local.

        Raises:
            BadInput: the rows are in no known format, the named columns cannot be used, or one of the rows is faulty
                and `on_bad_row` is stop.
        """
        if self.source.hub:
            return None
        head = list(islice(self.source.rows(self.limit), HEAD))
        parser = RowParser(self.parser.reading, self.config.source)
        parser.prepare([row.content for row in head], self._values, self.where)
        results = list(parser.parse_all(head))
        refuse_unknown(results, self.where)
        if on_bad_row == "stop" and self.parser.reading.prompts is None:  # else fewer rows are read
            for row, result in results:
                stop_at(row, result)
        return parser.format

    def parsed(self) -> Iterator[Parsed]:
        """Each row with its pair, or with the reason why it has none; a row may give further pairs."""
        rows = self.source.rows(self.limit)
        head = list(islice(rows, HEAD))
        self.parser.prepare([row.content for row in head], self._values, self.where)
        parsed = self.parser.parse_all(chain(head, rows))
        split = halved if self.parser.reading.wanted == "single answers" else None
        if self.edits:
            parsed = edited(parsed, self.edits, self.parser.notes, split)
        elif split:
            parsed = split(parsed)
        yield from parsed if self.parser.reading.prompts is None else _unrelated(parsed, self.parser.reading.prompts)

    def encoded(self, encode: Encode) -> Iterator[list[tuple[SourceRow, TokenizedPair | BadRow]]]:
        """Every row with its pair tokenized by a method of `PairTokenizer`, in batches and in the source's order."""
        rows = self.parsed()
        while batch := list(islice(rows, _BATCH)):
            tokenized = iter(encode([pair for _, pair in batch if isinstance(pair, PreferencePair)]))
            yield [(row, next(tokenized) if isinstance(pair, PreferencePair) else pair) for row, pair in batch]

    def _values(self, column: str) -> Counter[str]:
        """How often each value of a column occurs; the items of lists count one by one."""
        found: Counter[str] = Counter()
        for row in self.source.rows(_LABEL_ROWS):  # not only those to read, which may lack a value
            value = row.content.get(column) if isinstance(row.content, dict) else None
            found.update(
                label_key(each) for each in (value if isinstance(value, list) else [value]) if not is_empty(each)
            )
        return found


def _unrelated(parsed: Iterator[Parsed], count: int) -> Iterator[Parsed]:
    """The rows up to the pair with which `count` unrelated prompts have been seen; related ones are left out.

    Of single answers, half as many of either kind.
    """
    from pairtune.data.splits import Prompt, PromptIndex  # loads numpy, which refusing a source does not need

    seen: dict[str, int] = {}
    indexes = {kind: PromptIndex() for kind in ("pair", "desirable", "undesirable")}
    for row, result in parsed:
        if not isinstance(result, PreferencePair):
            yield row, result
            continue
        kind = "pair" if not result.single else "desirable" if result.chosen else "undesirable"
        wanted, index, prompt = count if kind == "pair" else count // 2, indexes[kind], Prompt.of(result.prompt)
        if seen.get(kind, 0) == wanted:
            yield row, LeftOut(f"more {kind} answers", "", "is not needed")
        elif next(index.related(prompt), None):
            yield row, LeftOut("related to an earlier prompt", "", "has a prompt that is related to an earlier one")
        else:
            number = seen[kind] = seen.get(kind, 0) + 1
            index.add(number - 1, prompt)
            yield row, result
            if sum(seen.values()) == count:
                return


def stop_at(row: SourceRow, result: object) -> None:
    """Stop at a faulty row; one that is only left out does not stop a run.

    Raises:
        BadInput: the result is a fault.
    """
    if isinstance(result, BadRow) and not isinstance(result, LeftOut):
        raise BadInput(f"{describe_fault(row, result)} (or --on-bad-row skip)")


def describe_fault(row: SourceRow, fault: BadRow) -> str:
    """The file, row, field and message of a fault, on one line."""
    named = f" field {fault.field}" if fault.field else ""
    return f"{row.file}: row {row.number}:{named} {fault}"
