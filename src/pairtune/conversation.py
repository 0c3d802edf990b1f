"""The type of a conversation, shared by data, models and records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12


class Message(TypedDict):
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


# Turns with `role` and `content`.
Conversation = Sequence[Mapping[str, object]]
