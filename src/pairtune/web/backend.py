"""The model server, through OpenAI's client: this project's worker, vLLM, llama.cpp or Ollama."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import openai
from django.conf import settings


@dataclass(frozen=True)
class Part:
    """A part of a streamed answer: text, queue position, finish reason, or token count."""

    text: str = ""
    fingerprint: str = ""
    queue: int | None = None
    reason: str = ""
    tokens: int | None = None


class Unanswered(Exception):
    """The answer failed; the message is shown to the user."""


@cache
def _client() -> openai.AsyncOpenAI:
    url = settings.PAIRTUNE_BACKEND.rstrip("/").removesuffix("/v1")
    # Our worker needs no key.
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=settings.PAIRTUNE_KEY or "none", max_retries=0, timeout=600)


@dataclass
class _ModelList:
    """The models of the server, asked for again after two seconds, since every chat page shows them."""

    known: list[dict[str, Any]] = field(default_factory=list)
    asked: float = 0.0

    async def get(self) -> list[dict[str, Any]] | None:
        if self.known and time.monotonic() - self.asked < _LIST_SECONDS:
            return self.known
        try:
            listed = [model async for model in _client().models.list()]
        except openai.OpenAIError:
            return None
        self.known = [{"id": each.id, **(getattr(each, "pairtune", None) or {})} for each in listed]
        self.asked = time.monotonic()
        return self.known


_LIST_SECONDS = 2
_model_list = _ModelList()


async def models() -> list[dict[str, Any]] | None:
    """List the models with the worker's details; None if the server cannot be reached."""
    return await _model_list.get()


async def answer(model: str, turns: Sequence[Mapping[str, str]], sampling: Mapping[str, Any]) -> AsyncIterator[Part]:
    """Stream an answer.

    Raises:
        Unanswered: the server cannot be reached, refuses the request, or fails midway.
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
            if (ahead := (getattr(chunk, "pairtune", None) or {}).get("queue")) is not None:
                yield Part(queue=ahead)
            if chunk.usage:
                yield Part(tokens=chunk.usage.completion_tokens)
            for choice in chunk.choices[:1]:
                yield Part(
                    choice.delta.content or "", chunk.system_fingerprint or "", reason=choice.finish_reason or ""
                )
                ended = ended or bool(choice.finish_reason)
    except openai.APIConnectionError as error:
        raise Unanswered("The model server cannot be reached.") from error
    except openai.NotFoundError as error:
        raise Unanswered(f"The model {model} is not available.") from error
    except openai.RateLimitError as error:
        raise Unanswered("Too many requests are waiting.") from error
    except openai.APIError as error:
        raise Unanswered(f"The model server reports: {error.message}") from error
    except Exception as error:
        raise Unanswered("The connection to the model server was lost.") from error
    if not ended:
        raise Unanswered("The model server stopped before the answer was complete.")
