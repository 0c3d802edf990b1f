"""The type of a conversation, shared by data, models and records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NotRequired  # pydantic needs this one before Python 3.12

from typing_extensions import TypedDict


class Message(TypedDict):
    """One turn of a conversation.

    Attributes:
        role: system, user, assistant or tool.
        content: its text; empty only where a turn calls tools.
        reasoning_content: the reasoning before an assistant's text.
        tool_calls: an assistant's calls, as OpenAI's API writes them.
        name: of the tool whose result this is.
        tool_call_id: of the call that it answers.
    """

    role: str
    content: str
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[Sequence[Mapping[str, object]]]
    name: NotRequired[str]
    tool_call_id: NotRequired[str]


# Turns with `role` and `content`.
Conversation = Sequence[Mapping[str, object]]
