"""The site's edit lists, one for each source, in the site's own folder; the sources themselves stay as they are."""

from __future__ import annotations

import threading
from datetime import datetime
from pathlib import Path

from django.conf import settings
from django.utils.text import slugify

from pairtune.config import source_name
from pairtune.data.edits import ENDING, Edit, EditList, is_edit_list, pair_hash, read_edits, row_of
from pairtune.data.preference import PreferencePair
from pairtune.files import fingerprint, typed_path, write_json
from pairtune.run.records import dump

_WRITING = threading.Lock()  # requests have threads of their own

# A pair by its row and its texts.
Key = tuple[str, str]


def key_of(pair: PreferencePair) -> Key:
    """What edits know a pair by."""
    return row_of(pair), pair_hash(pair)


def edits_file(source: str) -> Path:
    """The site's edit list of a source, whether it exists or not; files of one name in two folders have two lists."""
    folder: Path = settings.PAIRTUNE_SITE / "edits"
    return folder / f"{slugify(source_name(source))}-{fingerprint([_place(source)])[:8]}{ENDING}"


def edits_of(source: str) -> EditList:
    """The edits of a source: the site's, or those of the list that the source itself is.

    Raises:
        BadInput: the list is damaged.
    """
    for file in (edits_file(source), *([typed_path(source)] if is_edit_list(source) else [])):
        if file.is_file():
            return read_edits(file, str(file))
    return EditList(source=_place(source))


def by_pair(edits: EditList) -> dict[Key, Edit]:
    """The edits by the pairs that they are about."""
    return {(edit.row, edit.pair): edit for edit in edits.edits}


def edited_source(source: str) -> str:
    """The source with the site's edits: its edit list, if it has one."""
    file = edits_file(source)
    return str(file) if file.is_file() else source


def mark_pair(source: str, pair: PreferencePair, action: str) -> None:
    """Mark a pair as wrong (`drop`, `swap`), or take the mark away (`keep`).

    Raises:
        BadInput: the list is damaged.
    """
    with _WRITING:
        edits = by_pair(known := edits_of(source))
        row, texts = key_of(pair)
        edits.pop((row, texts), None)
        if action != "keep":
            now = datetime.now().astimezone().isoformat(timespec="seconds")
            edits[row, texts] = Edit(row=row, pair=texts, action=action, marked=now)
        file = edits_file(source)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, dump(known.model_copy(update={"edits": tuple(edits.values())})))


def _place(source: str) -> str:
    """The source, as a whole path if it is on this machine."""
    path = typed_path(source)
    return str(path.resolve()) if path.exists() else source
