r"""From one row of a file to a preference pair.

Read here: `prompt, chosen, rejected` as text (TRL's standard format, and `Dahoas/rm-static` with its additional
`response`). A prompt that is an Anthropic HH transcript (`\n\nHuman: … \n\nAssistant:`) becomes chat turns; any other
prompt becomes one user turn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pairtune.data.pairs import Message, PreferencePair

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_FIELDS = ("prompt", "chosen", "rejected")


class BadRow(Exception):
    """A row that cannot become a pair.

    Attributes:
        reason: a short name, the same for all rows with this fault; what `data.json` counts by.
        field: the field at fault.
    """

    def __init__(self, reason: str, field: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.field = field


def parse_row(row: Any, origin: str) -> PreferencePair:
    """Make a pair of a row. Outer white space of prompt and answers is stripped, as in the assignment.

    Raises:
        BadRow: the row is not an object, a field is missing, empty or not text, both answers are the same, or the
            prompt does not end where an answer is due.
    """
    if not isinstance(row, Mapping):
        raise BadRow("not an object", "", f"should be an object with {', '.join(_FIELDS)}, but is {_kind(row)}")
    texts = {}
    for name in _FIELDS:
        if name not in row:
            present = " ".join(", ".join(map(str, row)).split())  # names may hold line breaks; the message may not
            raise BadRow(f"no {name}", name, f"is missing; the row has {present[:200] or 'no fields'}")
        if not isinstance(row[name], str):
            raise BadRow(f"{name} is not text", name, f"should be text, but is {_kind(row[name])}")
        texts[name] = row[name].strip()
        if not texts[name]:
            raise BadRow(f"empty {name}", name, "is empty; give it a text or remove the row")
    if texts["chosen"] == texts["rejected"]:
        raise BadRow(
            "chosen equals rejected", "rejected", "is the same as chosen, so nothing is preferred; remove the row"
        )
    return PreferencePair(tuple(parse_prompt(row["prompt"])), texts["chosen"], texts["rejected"], origin)


def parse_prompt(text: str) -> list[Message]:
    """Chat turns of a prompt: an HH transcript's turns, or one user turn.

    Raises:
        BadRow: the transcript does not end with `Assistant:`, or a turn is empty.
    """
    if not text.lstrip().startswith(("Human:", "Assistant:")):
        return [{"role": "user", "content": text.strip()}]
    _, *parts = _TURN.split(text.strip())
    turns = [(speaker, said.strip()) for speaker, said in zip(parts[::2], parts[1::2], strict=True)]
    *said_turns, (last_speaker, last_said) = turns
    if last_speaker != "Assistant" or last_said or not said_turns or said_turns[-1][0] != "Human":
        raise BadRow("prompt has no open turn", "prompt", "should end with a Human turn and then 'Assistant:'")
    if not all(said for _, said in said_turns):
        raise BadRow("empty turn in prompt", "prompt", "has a turn without text; remove the row")
    return [{"role": _ROLES[speaker], "content": said} for speaker, said in said_turns]


def _kind(value: Any) -> str:
    names = {type(None): "null", dict: "an object", list: "a list", bool: "true/false", int: "a number"}
    return {**names, float: "a number", str: "text"}.get(type(value), type(value).__name__)
