"""Answers that are being written. They belong to the site, not to a page: pages come, go and come back.

Each answer is one task; what it has so far is here for all pages that show it, and in the database every second.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from pairtune.web import backend
from pairtune.web.models import Answer, Conversation, Turn

log = logging.getLogger(__name__)

_SAVE_SECONDS = 1.0
_SHOW_SECONDS = 0.1


@dataclass
class Writing:
    """An answer while it is written."""

    task: asyncio.Task[None] | None = None
    text: str = ""
    queue: int | None = None
    over: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)


_writing: dict[int, Writing] = {}


async def start(answer: Answer, turns: list[dict[str, str]]) -> None:
    """Have an answer written."""
    writing = _writing[answer.pk] = Writing()
    # In a context of its own: Django ends the database thread of the request's context together with the request.
    writing.task = asyncio.create_task(_write(answer, turns, writing), context=contextvars.Context())


async def stop(pk: int) -> None:
    """Stop an answer; what it has so far stays."""
    if (writing := _writing.get(pk)) and writing.task:
        writing.task.cancel()
        await asyncio.wait([writing.task])


async def follow(pk: int) -> AsyncIterator[Writing]:
    """The answer now, and again whenever there is more, at most ten times a second; ends with it."""
    while writing := _writing.get(pk):
        writing.changed.clear()
        yield writing
        if writing.over:
            return
        await writing.changed.wait()
        await asyncio.sleep(_SHOW_SECONDS)


async def _write(answer: Answer, turns: list[dict[str, str]], writing: Writing) -> None:
    started = saved = time.monotonic()
    state, reason = "done", ""
    try:
        async for part in backend.answer(answer.model, turns, answer.sampling):
            writing.text += part.text
            writing.queue = part.queue
            answer.fingerprint = part.fingerprint or answer.fingerprint
            answer.tokens = answer.tokens + bool(part.text) if part.tokens is None else part.tokens
            reason = part.reason or reason
            writing.changed.set()
            if time.monotonic() - saved > _SAVE_SECONDS:
                saved = time.monotonic()
                await Answer.objects.filter(pk=answer.pk).aupdate(text=writing.text)
    except asyncio.CancelledError:
        state = "stopped"
    except backend.Unanswered as failure:
        state, reason = "failed", str(failure)
    except Exception:
        log.exception("an answer could not be written")
        state, reason = "failed", "The site failed; its terminal says why."
    # An update, not a save: a conversation that was deleted meanwhile stays so, and what pages changed is left alone.
    saved_row = Answer.objects.filter(pk=answer.pk).aupdate(
        text=writing.text,
        state=state,
        reason=reason,
        fingerprint=answer.fingerprint,
        tokens=answer.tokens,
        seconds=time.monotonic() - started,
    )
    try:
        await asyncio.shield(asyncio.ensure_future(saved_row))
    finally:
        writing.over = True
        writing.changed.set()
        _writing.pop(answer.pk, None)


def history(turn: Turn, slot: int, path: list[Turn]) -> list[dict[str, str]]:
    """The conversation up to a turn, as the model of a slot has seen it."""
    turns = []
    for each in path:
        turns.append({"role": "user", "content": each.prompt})
        if each.pk == turn.pk:
            break
        shown = each.shown()
        last = shown[min(slot, len(shown) - 1)]
        written = _writing.get(last.pk)  # what has come of an answer that is still being written
        turns.append({"role": "assistant", "content": written.text if written else last.text})
    return turns


def make_answers(conversation: Conversation, turn: Turn) -> list[Answer]:
    """Empty answers to a turn, one of each model of the conversation."""
    return [
        Answer.objects.create(turn=turn, slot=slot, model=model, sampling=_asked(conversation.sampling))
        for slot, model in enumerate(conversation.model_names)
    ]


def _asked(sampling: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in sampling.items() if value is not None}


def forget_unfinished() -> int:
    """After a restart: answers that nobody writes any more are said to be broken off, with what they had."""
    lost = Answer.objects.filter(state="writing")
    count: int = lost.update(state="failed", reason="The site was stopped while this was written.")
    return count
