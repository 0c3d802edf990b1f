"""Turns the rows of one source into preference pairs; the first pair sets the source's format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pairtune.config import Reading
from pairtune.data.column_names import unknown_format
from pairtune.data.columns import check_codes, check_columns, format_of_columns
from pairtune.data.conversations import Parts, check_prompt, field_names, images_in, is_empty, kind_of, tools_of
from pairtune.data.formats import PAIR, Content, Format, detect_format, formats_with, has_prompt_column
from pairtune.data.pair_rows import Row, check_scores, same_answers
from pairtune.data.preference import BadRow, LeftOut, PreferencePair
from pairtune.data.rated_rows import Rated, RatedAnswer, pairs_of
from pairtune.data.sources import SourceRow
from pairtune.errors import BadInput

# A row, or a further pair of it, with the pair or the reason why there is none.
Parsed = tuple[SourceRow, PreferencePair | BadRow]

_UNKNOWN = ("unknown format", "not a pair")
_IMAGES = ("images", "image", "image_path", "image_url", "videos", "audios")


class RowParser:
    """Turns the rows of one source into pairs.

    Args:
        reading: how rows are read.
        source: the source's name, for messages.

    Attributes:
        format: the source's format, once a pair has been read.
        unused: how many rows have something in a field that is not read, by field.
        notes: how often something happened that a person should know about rows that were kept.
    """

    def __init__(self, reading: Reading | None = None, source: str = "SRC") -> None:
        self.reading = reading or Reading()
        self.source = source
        self.format: Format | None = None
        self.unused: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self._mapped: Format | None = None
        self._unread: dict[tuple[str, ...], tuple[str, ...]] = {}

    def prepare(self, head: Sequence[Any], values: Callable[[str], Counter[str]], where: str) -> None:
        """Look at the first rows before any is parsed.

        Args:
            head: the first rows.
            values: returns how often each value of a column occurs in the whole source.
            where: the source with its flag, for messages.

        Raises:
            BadInput: the columns that a person named cannot be used.
        """
        if not self.reading.columns:
            check_codes(head, values, where)
        elif self._mapped is None:
            check_columns(self.reading, head, where)
            self._mapped = format_of_columns(self.reading, head, values, where)

    def parse_all(self, rows: Iterable[SourceRow]) -> Iterator[Parsed]:
        """Every row with its pair, or with the reason why it has none; rows that belong together are joined."""
        held: list[tuple[SourceRow, RatedAnswer]] = []
        for row in rows:
            try:
                content = self._content(row.content)
            except BadRow as fault:
                yield row, fault
                continue
            if isinstance(content, RatedAnswer):
                if held and held[-1][1].prompt != content.prompt:
                    yield from self._joined(held)
                    held = []
                held.append((row, content))
            else:
                yield from self._results(row, content)
        if held:
            yield from self._joined(held)

    def parse(self, row: Any, origin: str) -> list[PreferencePair]:
        """Convert one row to its pairs, in a format in which rows stand alone.

        Raises:
            BadRow: the row is not a pair, is in a different format than earlier rows, or its parts cannot be used.
            LeftOut: the row is valid, but expresses no preference between two answers.
        """
        file, _, number = origin.rpartition(":")
        ((_, first), *others) = self.parse_all([SourceRow(file, int(number) if number.isdigit() else 1, row)])
        if isinstance(first, BadRow):
            raise first
        return [replace(first, origin=origin), *(each for _, each in others if isinstance(each, PreferencePair))]

    def _joined(self, held: Sequence[tuple[SourceRow, RatedAnswer]]) -> Iterator[Parsed]:
        """The pairs of neighbouring rows with one prompt, all under the first of these rows."""
        (first, one), *others = held
        rated = Rated(one.prompt, [each.answer for _, each in held], [each.score for _, each in held])
        yield from self._results(first, rated)
        for row, _ in others:
            yield row, LeftOut("joined to an earlier row with its prompt", "", "belongs to an earlier row")

    def _results(self, row: SourceRow, content: Parts | list[Parts] | list[Parts | BadRow] | Rated) -> Iterator[Parsed]:
        try:
            if isinstance(content, Rated):
                content = pairs_of(content, self.reading.pairing, self.reading.min_gap)
            tools = tools_of(row.content)
        except BadRow as fault:
            yield row, fault
            return
        for number, parts in enumerate([content] if isinstance(content, Parts) else content, 1):
            place, origin = _place(row, number)
            if isinstance(parts, BadRow):
                yield place, parts
                continue
            try:
                yield place, self._pair(parts, tools, origin)
            except BadRow as fault:
                yield place, fault

    def _pair(self, parts: Parts, tools: tuple[Mapping[str, Any], ...], origin: str) -> PreferencePair:
        prompt, chosen, rejected, thinking, note = parts
        if self.format is None:
            raise AssertionError("a row was read in no format")
        check_prompt(prompt, self.format.prompt_field)
        if chosen == rejected:
            raise same_answers()
        if note:
            self.notes[note] += 1
        return PreferencePair(tuple(prompt), chosen, rejected, origin, thinking, tools)

    def _content(self, row: Any) -> Content:
        if isinstance(row, BadRow):
            raise row
        if not isinstance(row, Mapping):
            raise BadRow("not an object", "", f"should be an object with fields, but is {kind_of(row)}")
        for field in _IMAGES:
            if not is_empty(row.get(field)):
                raise images_in(field)
        known = self._format_of(row)
        self._count_unused(known, row)
        if note := check_scores(row):
            self.notes[note] += 1
        if known.single and self.reading.wanted == "pairs":
            raise BadRow(
                "not a pair",
                "",
                "has one answer with a label, which --loss kto or bco learn from; add one of them, or give two answers "
                "a row",
            )
        content = known.read(row)
        self.format = known
        return content

    def _format_of(self, row: Row) -> Format:
        """The format to read a row with; if none fits, the one whose reader will name the faulty field."""
        if self._mapped:
            return self._mapped
        found = detect_format(row)
        if self.format is None:
            return found or self._nearest(row)
        if found in (None, self.format) or set(found.keys) < set(self.format.keys):
            return self.format
        raise BadRow("mixed formats", "", f"is in the format {found.name}, but earlier rows are in {self.format.name}")

    def _nearest(self, row: Row) -> Format:
        candidates = [known for known in formats_with(tuple(row)) if not known.strict]
        if has_prompt_column(row):  # whose name no format has: what has no prompt column is none of those without one
            candidates = [known for known in candidates if known.keys != PAIR]
        if candidates:
            most = max(len(known.keys) for known in candidates)
            return [known for known in candidates if len(known.keys) == most][-1]
        missing = [name for name in ("chosen", "rejected") if name not in row]
        if len(missing) == 1:
            raise BadRow(f"no {missing[0]}", missing[0], f"is missing; the row has {field_names(row)}")
        raise unknown_format(row, self.source)

    def _count_unused(self, known: Format, row: Row) -> None:
        names = tuple(row)
        unread = self._unread.get(names)
        if unread is None:
            unread = self._unread[names] = tuple(str(name) for name in names if not known.uses(str(name)))
        for name in unread:
            if not is_empty(row[name]):
                self.unused[name] += 1


def _place(row: SourceRow, number: int) -> tuple[SourceRow, str]:
    """Where the result with this number of a row is counted, and its origin."""
    name = f"{row.file}:{row.number}"
    return (row, name) if number == 1 else (replace(row, further=True), f"{name}.{number}")


def halved(parsed: Iterable[Parsed]) -> Iterator[Parsed]:
    """The same with two single answers instead of each pair."""
    last, number = ("", 0), 0
    for row, result in parsed:
        number = number if (row.file, row.number) == last else 0
        last = row.file, row.number
        for half in result.halves() if isinstance(result, PreferencePair) else [result]:
            number += 1
            place, origin = _place(replace(row, further=False), number)
            yield place, replace(half, origin=origin) if isinstance(half, PreferencePair) else half


def parse_row(row: Any, origin: str) -> PreferencePair:
    """Convert a single row to its first pair; see `RowParser.parse`."""
    return RowParser().parse(row, origin)[0]


def refuse_unknown(results: Sequence[Parsed], where: str) -> None:
    """Refuse a source none of whose first rows is in a known format.

    Raises:
        BadInput: with the fault of the first row.
    """
    if results and all(isinstance(each, BadRow) and each.reason in _UNKNOWN for _, each in results):
        row, fault = results[0]
        raise BadInput(f"{where}: row {row.number} {fault}")
