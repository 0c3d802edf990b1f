"""Rows with single answers, each desirable or not: unpaired feedback such as thumbs, for KTO and BCO."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pairtune.conversation import Message
from pairtune.data.conversations import (
    Parts,
    check_text,
    is_empty,
    kind_of,
    need,
    one_line_of,
    read_text,
    read_turns,
    split_answers,
    system_turn,
)
from pairtune.data.judged_rows import label_key
from pairtune.data.preference import BadRow, LeftOut

Row = Mapping[str, Any]

_DESIRABLE = {"true", "1", "+1", "yes", "y", "good", "desirable", "up", "thumbs up", "thumbs_up", "like", "liked", "👍"}
_UNDESIRABLE = {"false", "0", "-1", "no", "n", "bad", "undesirable", "down", "thumbs down", "thumbs_down"}
_UNDESIRABLE |= {"dislike", "disliked", "👎"}


def is_thumb(value: Any) -> bool:
    """Whether a value says of one answer that it is desirable or not."""
    return label_key(value) in _DESIRABLE | _UNDESIRABLE


def has_thumb(label: str) -> Callable[[Row], bool]:
    """A check that the label of a row is a thumb, or missing."""
    return lambda row: is_empty(row.get(label)) or is_thumb(row[label])


def desirable(row: Row, label: str) -> bool:
    """What a row's label says of its answer.

    Raises:
        LeftOut: there is no label.
        BadRow: the label is not one that says it.
    """
    value = row.get(label)
    if is_empty(value):
        raise LeftOut("no label", label, "is empty, so nothing is known about the answer")
    key = label_key(value)
    if key not in _DESIRABLE | _UNDESIRABLE:
        fault = f"is {one_line_of(value, 20)}, which is neither true (desirable) nor false (undesirable)"
        raise BadRow("unclear label", label, fault)
    return key in _DESIRABLE


def completion(prompt: Callable[[Row], list[Message]], answer: str, label: str) -> Callable[[Row], Parts]:
    """A prompt, and an answer as text or as turns."""

    def read(row: Row) -> Parts:
        good, given = desirable(row, label), need(row, answer)
        if isinstance(given, list | Mapping):
            turns = read_turns(given, answer)
            return _single(split_answers(prompt(row), turns, turns, (answer, answer)), good=good)
        text = read_text(row, answer)
        return _single(Parts(prompt(row), text, text), good=good)

    return read


def conversation(turns: str, label: str) -> Callable[[Row], Parts]:
    """A conversation whose last turn is the answer."""

    def read(row: Row) -> Parts:
        good, whole = desirable(row, label), read_turns(need(row, turns), turns)
        return _single(split_answers(system_turn(row), whole, whole, (turns, turns)), good=good)

    return read


def _single(parts: Parts, *, good: bool) -> Parts:
    """The pair of an answer with itself as a single answer."""
    reasoning = parts.thinking[0]
    if good:
        return Parts(parts.prompt, check_text(parts.chosen, "answer"), "", (reasoning, ""))
    return Parts(parts.prompt, "", check_text(parts.rejected, "answer"), ("", reasoning))


# --- Open WebUI: chats as a tree of messages, with ratings of 1 and -1 on answers


def is_chat(row: Row) -> bool:
    """Whether a row is an exported chat."""
    return _messages(row["chat"]) is not None


def is_feedback(row: Row) -> bool:
    """Whether a row is an exported rating."""
    return isinstance(row["data"], Mapping) and isinstance(row["meta"], Mapping) and "rating" in row["data"]


def rated_chat(row: Row) -> list[Parts | BadRow]:
    """The rated answers of an exported chat, in all of its branches, or what is wrong with them."""
    chat = need(row, "chat")
    messages = _messages(chat)
    if messages is None:
        raise BadRow("no messages", "chat", "has no history with messages")
    found: list[Parts | BadRow] = []
    for key, message in messages.items():
        if rating := _rating(message):
            try:
                found.append(_rated(messages, key, rating, _system(chat)))
            except BadRow as fault:
                found.append(fault)
    if not found:
        raise LeftOut("no rated answer", "chat", "has no answer with a thumb")
    return found


def feedback(row: Row) -> Parts:
    """An exported rating with its chat."""
    data, meta = need(row, "data"), need(row, "meta")
    for name, value in (("data", data), ("meta", meta)):
        if not isinstance(value, Mapping):
            raise BadRow(f"{name} is no object", name, f"should be an object, but is {kind_of(value)}")
    rating, key = data.get("rating"), str(meta.get("message_id"))
    if rating not in (1, -1):
        raise LeftOut("no thumb", "data", f"has the rating {one_line_of(rating, 20)}, which is neither 1 nor -1")
    kept = row.get("snapshot")
    inner: Any = kept.get("chat") if isinstance(kept, Mapping) else None
    inner = inner.get("chat", inner) if isinstance(inner, Mapping) else None
    messages = _messages(inner)
    if messages is None or key not in messages:
        fault = f"does not have the rated message {one_line_of(key, 40)}; export the chats instead"
        raise BadRow("no rated message", "snapshot", fault)
    return _rated(messages, key, rating, _system(inner))


def _messages(chat: Any) -> Mapping[str, Any] | None:
    """The messages of a chat by their ids; None if it has none."""
    history = chat.get("history") if isinstance(chat, Mapping) else None
    messages = history.get("messages") if isinstance(history, Mapping) else None
    return messages if isinstance(messages, Mapping) else None


def _system(chat: Any) -> list[Message]:
    params = chat.get("params") if isinstance(chat, Mapping) else None
    return system_turn({"system": params.get("system") if isinstance(params, Mapping) else None})


def _rating(message: Any) -> int:
    """1 or -1; 0 for what is not a rated answer."""
    annotation = message.get("annotation") if isinstance(message, Mapping) else None
    rating = annotation.get("rating") if isinstance(annotation, Mapping) else None
    return rating if rating in (1, -1) and message.get("role") == "assistant" else 0


def _rated(messages: Mapping[str, Any], key: str, rating: int, system: list[Message]) -> Parts:
    turns = [_without_details(each) for each in _path(messages, key)]
    for turn in turns[1:]:
        turn.pop("reasoning_content", None)  # of earlier turns, which templates leave out too
    whole = read_turns(list(reversed(turns)), "chat")
    return _single(split_answers(system, whole, whole, ("chat", "chat")), good=rating == 1)


_DETAILS = re.compile(r"<details type=\"(?P<type>\w+)\"[^>]*>(?P<inner>.*?)</details>\s*", re.DOTALL)
_SUMMARY = re.compile(r"<summary>.*?</summary>", re.DOTALL)


def _without_details(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without the folded blocks that Open WebUI writes into its text; reasoning becomes a field."""
    turn, content = {"role": message["role"], "content": message["content"]}, message["content"]
    if not isinstance(content, str):
        return turn
    reasoning = []
    for block in _DETAILS.finditer(content):
        if block["type"] != "reasoning":
            raise BadRow("tool calls", "chat", f"has a block of {block['type']}; only answers in text can be used")
        lines = _SUMMARY.sub("", block["inner"]).strip().splitlines()
        reasoning.append("\n".join(line.removeprefix("> ").removeprefix(">") for line in lines))
    turn["content"] = _DETAILS.sub("", content)
    return turn | ({"reasoning_content": "\n".join(reasoning)} if reasoning else {})


def _path(messages: Mapping[str, Any], key: str) -> Iterator[Mapping[str, Any]]:
    """The messages from one to the first of its branch."""
    seen: set[str] = set()
    following: Any = key
    while following is not None:
        message = messages.get(following) if isinstance(following, str) else None
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys() or following in seen:
            fault = f"message {one_line_of(following, 40)} is {kind_of(message)}, or leads back to itself"
            raise BadRow("broken chat", "chat", fault)
        seen.add(following)
        yield message
        following = message.get("parentId")
