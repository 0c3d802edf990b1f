"""Answers in progress. They belong to the site, not to a page, so that pages can be closed and reopened.

Each answer is one task. Its text so far is available to all pages that show it, and is saved every second.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from asgiref.sync import sync_to_async
from django.db import OperationalError

from pairtune.web import backend
from pairtune.web.models import Answer, Conversation, Turn

log = logging.getLogger(__name__)

T = TypeVar("T")

_SAVE_SECONDS = 1.0
_INSIST_SECONDS = 2.0
_SHOW_SECONDS = 0.1


@dataclass
class Writing:
    """An answer in progress."""

    task: asyncio.Task[None] | None = None
    text: str = ""
    queue: int | None = None
    over: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)


_writing: dict[int, Writing] = {}


async def start(answer: Answer, turns: list[dict[str, str]]) -> None:
    """Start writing an answer, or go on with one that has text already."""
    writing = _writing[answer.pk] = Writing(text=answer.text)
    if answer.text:
        turns = [*turns, {"role": "assistant", "content": answer.text}]
    # In a new context: the database thread of the request's context ends with the request.
    writing.task = asyncio.create_task(_write(answer, turns, writing), context=contextvars.Context())


async def start_all(conversation: Conversation, turn: Turn, answers: Sequence[Answer]) -> None:
    """Start writing the answers to a turn."""
    path = await sync_to_async(conversation.path)(turn.pk)
    for answer in answers:
        turns = await sync_to_async(history)(conversation, turn, answer.slot, path)
        await start(answer, turns)


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Do some work whole, even if the page is closed meanwhile; half of it would leave answers that nobody writes."""
    # In a new context, whose database thread does not end with the request.
    return await asyncio.shield(asyncio.create_task(work, context=contextvars.Context()))


def so_far(pk: int) -> str | None:
    """The text of an answer in progress; None if it is not being written."""
    writing = _writing.get(pk)
    return writing.text if writing else None


async def stop(pk: int) -> None:
    """Stop an answer and keep its text so far."""
    if (writing := _writing.get(pk)) and writing.task:
        writing.task.cancel()
        await asyncio.wait([writing.task])


async def follow(pk: int) -> AsyncIterator[Writing]:
    """Yield the answer now and after every change, at most ten times a second, until it ends."""
    while writing := _writing.get(pk):
        writing.changed.clear()
        yield writing
        if writing.over:
            return
        await writing.changed.wait()
        await asyncio.sleep(_SHOW_SECONDS)


async def follow_all(pks: Sequence[int]) -> AsyncIterator[tuple[int, Writing | None]]:
    """Yield every change of several answers with the answer's key; None when one of them has ended."""
    changes: asyncio.Queue[tuple[int, Writing | None]] = asyncio.Queue()

    async def watch(pk: int) -> None:
        async for writing in follow(pk):
            await changes.put((pk, writing))
        await changes.put((pk, None))

    watching = [asyncio.create_task(watch(pk)) for pk in pks]
    try:
        left = len(watching)
        while left:
            pk, writing = await changes.get()
            left -= writing is None
            yield pk, writing
    finally:
        for task in watching:
            task.cancel()


async def _write(answer: Answer, turns: list[dict[str, str]], writing: Writing) -> None:
    started = saved = time.monotonic()
    before, spent, goes_on = answer.tokens, answer.seconds, bool(answer.text)
    state, reason, remedy = "done", "", ""
    try:
        async for part in backend.answer(answer.model, turns, answer.sampling, goes_on=goes_on):
            writing.text += part.text
            writing.queue = part.queue
            answer.fingerprint = part.fingerprint or answer.fingerprint
            answer.tokens = answer.tokens + bool(part.text) if part.tokens is None else before + part.tokens
            reason = part.reason or reason
            writing.changed.set()
            if time.monotonic() - saved > _SAVE_SECONDS:
                saved = time.monotonic()
                with suppress(OperationalError):  # a full disk; the end insists
                    await Answer.objects.filter(pk=answer.pk).aupdate(text=writing.text)
    except asyncio.CancelledError:
        state = "stopped"
    except backend.Unanswered as failure:
        state, reason, remedy = "failed", str(failure), failure.remedy
    except Exception:
        log.exception("an answer could not be written")
        state, reason, remedy = "failed", "The site failed; see its terminal for the reason.", "again"
    # An update, not a save: a conversation deleted meanwhile stays deleted, and fields that pages changed are kept.
    kept = _keep(
        answer.pk,
        text=writing.text,
        state=state,
        reason=reason,
        remedy=remedy,
        fingerprint=answer.fingerprint,
        tokens=answer.tokens,
        seconds=spent + time.monotonic() - started,
    )
    try:
        await asyncio.shield(asyncio.ensure_future(kept))
    finally:
        writing.over = True
        writing.changed.set()
        _writing.pop(answer.pk, None)


async def _keep(pk: int, **fields: Any) -> None:
    """Save an answer that has ended; on a full disk, when there is room again."""
    while True:
        try:
            await Answer.objects.filter(pk=pk).aupdate(**fields)
        except OperationalError as error:
            log.warning("an answer cannot be kept yet: %s", error)
            await asyncio.sleep(_INSIST_SECONDS)
        else:
            return


def history(conversation: Conversation, turn: Turn, slot: int, path: list[Turn]) -> list[dict[str, str]]:
    """The conversation up to a turn, as the model in a slot has seen it, with the system message."""
    turns = [{"role": "system", "content": conversation.system}] if conversation.system else []
    for each in path:
        turns.append({"role": "user", "content": each.prompt})
        if each.pk == turn.pk:
            break
        if not (shown := each.shown):
            continue
        last = shown[min(slot, len(shown) - 1)]
        written = _writing.get(last.pk)  # the text so far of an answer in progress
        turns.append({"role": "assistant", "content": written.text if written else last.text})
    return turns


def make_answers(conversation: Conversation, turn: Turn) -> list[Answer]:
    """Create empty answers to a turn, one for each model of the conversation."""
    return [
        Answer.objects.create(turn=turn, slot=slot, model=model, sampling=_without_unset(conversation.sampling))
        for slot, model in enumerate(conversation.model_names)
    ]


def _without_unset(sampling: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in sampling.items() if value is not None}


def forget_unfinished() -> int:
    """Mark answers that a restart interrupted as failed; they keep their text."""
    lost = Answer.objects.filter(state="writing")
    count: int = lost.update(state="failed", reason="The site was stopped while writing this answer.", remedy="again")
    return count
