"""The server of models, through OpenAI's client: this project's worker, vLLM, llama.cpp, Ollama."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import openai
from django.conf import settings


@dataclass(frozen=True)
class Part:
    """What a server says of an answer: a piece of text, a place in the queue, how it ended, how many tokens it had."""

    text: str = ""
    fingerprint: str = ""
    queue: int | None = None
    reason: str = ""
    tokens: int | None = None


class Unanswered(Exception):
    """No (more) answer; the message is for people."""


@cache
def _client() -> openai.AsyncOpenAI:
    url = settings.PAIRTUNE_BACKEND.rstrip("/").removesuffix("/v1")
    # A key is the backend's own matter; ours needs none.
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=settings.PAIRTUNE_KEY or "none", max_retries=0, timeout=600)


_listed: tuple[float, list[dict[str, Any]]] = (0.0, [])


async def models() -> list[dict[str, Any]] | None:
    """The models, by `id`, with what our worker says of them; None where the server cannot be reached.

    Asked at most once in two seconds: every page of the chat shows them.
    """
    global _listed  # noqa: PLW0603 - one server, one list
    asked, known = _listed
    if time.monotonic() - asked < 2 and known:
        return known
    try:
        found = [{"id": each.id, **(getattr(each, "pairtune", None) or {})} async for each in _client().models.list()]
    except openai.OpenAIError:
        return None
    _listed = (time.monotonic(), found)
    return found


async def answer(model: str, turns: Sequence[Mapping[str, str]], sampling: Mapping[str, Any]) -> AsyncIterator[Part]:
    """An answer as it is written.

    Raises:
        Unanswered: the server cannot be reached, refuses, or fails in between.
    """
    ended = False
    try:
        stream = await _client().chat.completions.create(
            model=model,
            messages=list(turns),
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"pairtune": {"queue": True}},
            **sampling,
        )
        async for chunk in stream:
            if (place := (getattr(chunk, "pairtune", None) or {}).get("queue")) is not None:
                yield Part(queue=place)
            if chunk.usage:
                yield Part(tokens=chunk.usage.completion_tokens)
            for choice in chunk.choices[:1]:
                yield Part(
                    choice.delta.content or "", chunk.system_fingerprint or "", reason=choice.finish_reason or ""
                )
                ended = ended or bool(choice.finish_reason)
    except openai.APIConnectionError as error:
        raise Unanswered("The server of models cannot be reached.") from error
    except openai.NotFoundError as error:
        raise Unanswered(f"The model {model} is not there (any more).") from error
    except openai.RateLimitError as error:
        raise Unanswered("Too many are waiting already.") from error
    except openai.APIError as error:
        raise Unanswered(f"The server of models says: {error.message}") from error
    except Exception as error:
        raise Unanswered("The connection to the server of models broke off.") from error
    if not ended:
        raise Unanswered("The server of models ended before its answer did.")
