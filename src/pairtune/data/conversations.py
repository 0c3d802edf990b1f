r"""Reads conversations from row fields: texts, HH transcripts (`\n\nHuman: … \n\nAssistant: …`), lists of turns."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pairtune.conversation import Message
from pairtune.data.preference import BadRow

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
}
# Where rows keep a system message, and turns the reasoning before an answer.
SYSTEM_FIELDS = ("system", "system_prompt")
_THINKING = ("reasoning_content", "thinking", "reasoning")
_IMAGE_PARTS = ("image", "image_url", "input_image", "video", "audio")


def is_transcript(text: Any) -> bool:
    """Whether a value is the text of an HH transcript."""
    return isinstance(text, str) and text.lstrip().startswith(("Human:", "Assistant:"))


def read_text(row: Mapping[str, Any], field: str) -> str:
    """A field's text, with surrounding whitespace stripped.

    Raises:
        BadRow: the field is missing, not text, empty, or not valid Unicode.
    """
    return check_text(need(row, field), field)


def need(row: Mapping[str, Any], field: str) -> Any:
    """A field's value.

    Raises:
        BadRow: the row has no such field.
    """
    if field not in row:
        raise BadRow(f"no {field}", field, f"is missing; the row has {field_names(row)}")
    return row[field]


def need_list(row: Mapping[str, Any], field: str) -> list[Any]:
    """A field's list.

    Raises:
        BadRow: the row has no such field, or it is no list.
    """
    value = need(row, field)
    if not isinstance(value, list):
        raise BadRow(f"{field} is no list", field, f"should be a list, but is {kind_of(value)}")
    return value


def field_names(row: Mapping[str, Any]) -> str:
    """The names of a row's fields for a message, always on one line."""
    return one_line_of(", ".join(map(str, row)), 200) or "no fields"


def check_text(value: Any, field: str) -> str:
    """A value as text, with surrounding whitespace stripped.

    Raises:
        BadRow: the value is not text, empty, or not valid Unicode.
    """
    if not isinstance(value, str):
        raise BadRow(f"{field} is not text", field, f"should be text, but is {kind_of(value)}")
    text = value.strip()
    if not text:
        raise BadRow(f"empty {field}", field, "is empty; fill it in or remove the row")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            fault = f"is not valid Unicode at character {error.start + 1}; save the file as UTF-8"
            raise BadRow(f"{field} is not valid Unicode", field, fault) from None
    return text


def read_prompt(value: Any, field: str) -> list[Message]:
    """The conversation before the answer: a transcript's turns, one user turn, or a list of turns.

    Raises:
        BadRow: the value is none of these, or a transcript does not end with `Assistant:`.
    """
    if not is_transcript(value):
        return read_turns(value, field) if isinstance(value, list) else user_turn(check_text(value, field))
    *turns, last = _read_transcript(check_text(value, field), field)
    if last["role"] != "assistant" or last["content"] or not turns:
        raise BadRow("prompt has no open turn", field, "should end with a Human turn and then 'Assistant:'")
    return turns


def user_turn(text: str) -> list[Message]:
    """A prompt that consists of one user turn."""
    return [{"role": "user", "content": text}]


def system_turn(row: Mapping[str, Any]) -> list[Message]:
    """The system message of a row that has one; empty ones are common and are omitted."""
    field = next((name for name in SYSTEM_FIELDS if not is_empty(row.get(name))), None)
    return [{"role": "system", "content": check_text(row[field], field)}] if field else []


def is_empty(value: Any) -> bool:
    """Whether a field holds nothing: null, NaN, blank text, or an empty list or object."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value)) or value in ([], {})


def read_turns(value: Any, field: str) -> list[Message]:
    """Turns from a list of `{role, content}` or ShareGPT's `{from, value}`, or from one such turn.

    Raises:
        BadRow: a turn has a different shape or an unknown role.
    """
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, list):
        raise BadRow(f"{field} is not turns", field, f"should be a list of turns, but is {kind_of(value)}")
    if not turns:
        raise BadRow(f"empty {field}", field, "is empty; add a turn or remove the row")
    return [_read_turn(turn, field, number) for number, turn in enumerate(turns, 1)]


def _read_turn(turn: Any, field: str, number: int) -> Message:
    if not isinstance(turn, Mapping):
        raise BadRow(f"{field} is not turns", field, f"turn {number} should be an object, but is {kind_of(turn)}")
    name = next((key for key in ("role", "from") if key in turn), "role")
    speaker = turn.get(name)
    role = _ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        shown = one_line_of(speaker)
        raise BadRow("unknown role", field, f"turn {number} has the {name} {shown}; use system, user or assistant")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list) and content:
        if any(isinstance(part, Mapping) and part.get("type") in _IMAGE_PARTS for part in content):
            raise images_in(field)
        if all(_is_text_part(part) for part in content):
            content = "".join(part["text"] for part in content)  # how chat APIs represent text: a list of parts
    calls = turn.get("tool_calls")
    if calls:
        if role != "assistant" or not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
            raise BadRow("tool calls", field, f"turn {number} has tool_calls that are not an assistant's list of calls")
        content = "" if is_empty(content) else content
        return {"role": role, "content": content and check_text(content, field), "tool_calls": calls}
    if isinstance(content, str) and not content.strip():
        raise BadRow("empty turn", field, f"turn {number} is empty; remove the row")
    message: Message = {"role": role, "content": check_text(content, field)}
    thinking = next((turn[name] for name in _THINKING if name in turn and not is_empty(turn[name])), None)
    if thinking is not None and role == "assistant":
        message["reasoning_content"] = check_text(thinking, field)
    if role == "tool":
        for key in ("name", "tool_call_id"):
            if isinstance(turn.get(key), str):
                message[key] = turn[key]
    return message


def tools_of(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The tools that a row offers, as JSON schemas; a list, or a text that holds one.

    Raises:
        BadRow: they are no list of objects.
    """
    within = row.get("input")  # OpenAI's format keeps them beside the messages
    value = row.get("tools") or (within.get("tools") if isinstance(within, Mapping) else None)
    if is_empty(value):
        return ()
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise BadRow("tools are no list", "tools", "should be a list of JSON schemas")
    return tuple(value)


def images_in(field: str) -> BadRow:
    """The fault of a row with an image."""
    return BadRow("images", field, "has images, and only text can be trained on; remove the row")


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def read_transcript(value: Any, field: str) -> list[Message]:
    """The turns of a whole HH transcript, the last of which is the answer.

    Raises:
        BadRow: it does not end with an `Assistant:` turn that has text.
    """
    turns = _read_transcript(check_text(value, field), field)
    if turns[-1]["role"] != "assistant":
        raise BadRow("no answer at the end", field, "should end with an Assistant turn")
    if not turns[-1]["content"]:
        raise BadRow(f"empty {field}", field, "ends with an empty answer; remove the row")
    return turns


def _read_transcript(text: str, field: str) -> list[Message]:
    _, *parts = _TURN.split(text)
    turns: list[Message] = [
        {"role": _ROLES[speaker.lower()], "content": content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    if not all(turn["content"] for turn in turns[:-1]):
        raise BadRow(f"empty turn in {field}", field, "has a turn without text; remove the row")
    return turns


def check_prompt(turns: Sequence[Message], field: str) -> None:
    """Make sure that a prompt can be answered: an optional system message, then alternating turns, a user last.

    A turn that calls tools, and the tools' results after it, belong to the assistant's turn that follows; the prompt
    may end with such results.

    Raises:
        BadRow: the roles do not alternate.
    """
    expected, called = "user", False
    for number, turn in enumerate(turns, 1):
        role = turn["role"]
        if role == "system" and number == 1:
            continue
        if role == "tool" and called:
            continue
        if role != expected:
            raise BadRow(
                "roles do not alternate", field, f"turn {number} should have the role {expected}, but has {role}"
            )
        called = bool(turn.get("tool_calls"))
        if not called:
            expected = "user" if role == "assistant" else "assistant"
    if expected != "assistant" or (called and turns[-1]["role"] != "tool"):
        raise BadRow("prompt has no open turn", field, "should end with a user turn, which the answers respond to")


class Parts(NamedTuple):
    """What a row says: a prompt, the better answer, the other one, the reasoning before either, and what to count."""

    prompt: list[Message]
    chosen: str
    rejected: str
    thinking: tuple[str, str] = ("", "")
    note: str = ""


def split_answers(
    prompt: list[Message], chosen: list[Message], rejected: list[Message], fields: tuple[str, str]
) -> Parts:
    """Split two conversations into the prompt that they share and their last turns, the answers.

    Args:
        prompt: what precedes both; empty if the conversations include it.
        chosen: one or more turns. They may repeat the prompt, as UltraFeedback's do.
        rejected: likewise.
        fields: the field names of the two, for messages.

    Raises:
        BadRow: an answer is not from the assistant, or the conversations differ before their last turns, so that the
            preference is not about a single answer.
    """
    contexts = []
    for turns, field in zip((chosen, rejected), fields, strict=True):
        if turns[-1]["role"] != "assistant":
            raise BadRow("no answer at the end", field, f"should end with an assistant turn, not {turns[-1]['role']}")
        if turns[-1].get("tool_calls"):
            raise BadRow("tool calls", field, "ends with a call of tools; only answers in text can be compared")
        contexts.append(_context(prompt, turns[:-1]))
    if contexts[0] != contexts[1]:
        raise BadRow("prompts differ", fields[1], f"answers a different conversation than {fields[0]}; remove the row")
    better, worse = chosen[-1], rejected[-1]
    thinking = (better.get("reasoning_content", ""), worse.get("reasoning_content", ""))
    return Parts(contexts[0], better["content"], worse["content"], thinking)


def _context(prompt: list[Message], before: list[Message]) -> list[Message]:
    """The turns before an answer: the prompt and the turns in `before`, which may repeat the prompt."""
    system = [turn for turn in prompt if turn["role"] == "system"]
    dialogue = prompt[len(system) :]
    if before[: len(prompt)] == prompt:
        return before
    return system + before if before[: len(dialogue)] == dialogue else prompt + before


def kind_of(value: Any) -> str:
    """The type of a value, in words for a message."""
    names = {type(None): "null", dict: "an object", list: "a list", bool: "true/false", int: "a number"}
    return {**names, float: "a number", str: "text"}.get(type(value), type(value).__name__)


def one_line_of(value: Any, limit: int = 40) -> str:
    """The beginning of a value as one printable line."""
    line = " ".join(str(value).split())[:limit].encode("utf-8", "replace").decode()
    return "".join(character if character.isprintable() else "?" for character in line)
