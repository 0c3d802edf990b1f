"""Edit lists: pairs of a source that a person has marked as wrong, applied whenever `--data` names the list.

A list is a JSON file, `NAME.edits.json`, that names its source. The source itself stays as it is, `data.json` counts
what was left out or swapped, and every edit says when it was made and why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from pairtune.data.preference import BadRow, LeftOut, PreferencePair
from pairtune.data.row_parser import Parsed
from pairtune.errors import BadInput
from pairtune.files import fingerprint, read_json
from pairtune.run.records import Part

ENDING = ".edits.json"


class Edit(Part):
    """One pair that was marked.

    Attributes:
        row: the row of the pair within its file, as in its origin.
        pair: a hash of its texts, so that an edit never applies to another pair.
        action: `drop` leaves the pair out; `swap` takes the other answer for the better one.
        reason: in the person's words.
        marked: when, as ISO 8601.
    """

    row: str
    pair: str
    action: Literal["drop", "swap"]
    reason: str = ""
    marked: str = ""


class EditList(Part):
    """The edits of one source."""

    source: str
    edits: tuple[Edit, ...] = ()


def is_edit_list(name: str) -> bool:
    """Whether a source is an edit list."""
    return name.endswith(ENDING)


def read_edits(path: Path, where: str) -> EditList:
    """Read an edit list.

    Args:
        path: the file.
        where: flag and source, for messages.

    Raises:
        BadInput: the file is missing, or is not an edit list.
    """
    if not path.is_file():
        raise BadInput(f"{where}: no such file or folder")
    try:
        return EditList.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise BadInput(f"{where}: {field}: {first['msg'].lower()}; it is not an edit list") from error


def pair_hash(pair: PreferencePair) -> str:
    """A hash of a pair's texts."""
    prompt = (f"{turn['role']}: {turn['content']}" for turn in pair.prompt)
    return fingerprint([*prompt, pair.chosen, pair.rejected])


def row_of(pair: PreferencePair) -> str:
    """The row of a pair within its file."""
    return pair.origin.rpartition(":")[2]


def edited(
    parsed: Iterator[Parsed],
    edits: EditList,
    notes: Counter[str],
    split: Callable[[Iterator[Parsed]], Iterator[Parsed]] | None = None,
) -> Iterator[Parsed]:
    """The pairs with the edits applied.

    Args:
        parsed: rows with their pairs.
        edits: the list.
        notes: where swapped pairs, and edits that match no pair any more, are counted.
        split: makes single answers of pairs, to which edits of single answers are applied.
    """
    left = {(edit.row, edit.pair): edit for edit in edits.edits}
    done = _apply(parsed, left, notes)
    yield from _apply(split(done), left, notes) if split else done
    if left:
        notes["edits that match no pair any more"] += len(left)


def _apply(parsed: Iterator[Parsed], left: dict[tuple[str, str], Edit], notes: Counter[str]) -> Iterator[Parsed]:
    rows = {row for row, _ in left}
    for row, result in parsed:
        found = _edit_of(result, rows, left)
        if found is None or not isinstance(result, PreferencePair):
            yield row, result
        elif found.action == "drop":
            yield row, LeftOut("marked as wrong", "", f"was marked as wrong on {found.marked or 'an unknown day'}")
        else:
            notes["pairs whose answers were swapped, as marked"] += 1
            yield row, replace(result, chosen=result.rejected, rejected=result.chosen, thinking=result.thinking[::-1])


def _edit_of(result: PreferencePair | BadRow, rows: set[str], left: dict[tuple[str, str], Edit]) -> Edit | None:
    if not isinstance(result, PreferencePair) or row_of(result) not in rows:
        return None
    return left.pop((row_of(result), pair_hash(result)), None)
