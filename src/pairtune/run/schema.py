"""The format of a run folder's records, and the migrations from earlier formats.

Format 1 had no number and grew while in use, so its older files lack later fields. Format 2 is described by
`pairtune.run.records`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import ValidationError

from pairtune.errors import BadInput
from pairtune.run.records import Record, dump

FORMAT = 2
_KEY = "format"

Json = dict[str, Any]
R = TypeVar("R", bound=Record)


def to_json(record: Record) -> Json:
    """The content of a record's file."""
    return {_KEY: FORMAT, **dump(record)}


def from_json(kind: type[R], content: object, where: str) -> R:
    """The record that a file holds.

    Args:
        kind: the type of the record.
        content: the parsed content of the file.
        where: the file, for error messages.

    Raises:
        BadInput: the content is not such a record, or has a later format.
    """
    if not isinstance(content, dict):
        raise BadInput(f"{where}: should contain a JSON object; the file is damaged")
    version = content.get(_KEY, 1)
    if not isinstance(version, int) or version > FORMAT:
        raise BadInput(
            f"{where}: has format {version}, written by a later version of pairtune; update pairtune to read it"
        )
    try:
        return kind.model_validate(_from_1(kind.file, content) if version == 1 else content)
    except ValidationError as error:
        fault = error.errors()[0]
        field = ".".join(map(str, fault["loc"]))
        raise BadInput(f"{where}: {field}: {fault['msg'].lower()}; the file is damaged") from error


def _from_1(file: str, content: Json) -> Json:
    migrate = _MIGRATIONS.get(file)
    return migrate(dict(content)) if migrate else content


def _trial(old: Json) -> Json:
    """Before trials ran side by side, a trial's own share of the training time was all of it."""
    return {"own_seconds": old.get("train_seconds", 0.0)} | old


def _selection(old: Json) -> Json:
    """Whether the winner differs from all other trials was recorded only in the comparisons."""
    return {"settled": all(each.get("differs", True) for each in old.get("comparisons", []))} | old


_MIGRATIONS: dict[str, Callable[[Json], Json]] = {
    "trial.json": _trial,
    "selection.json": _selection,
}
