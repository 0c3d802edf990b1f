"""The model server, through OpenAI's client: this project's worker, vLLM, llama.cpp or Ollama."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import httpx
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


@dataclass(frozen=True)
class Model:
    """A model that can be talked to.

    Attributes:
        id: its name at the server.
        base: its base model's name; empty if the server does not say.
        run: the run that it comes from; empty if there is none.
        created: Unix time.
        fingerprint: of its weights; empty if the server does not say.
    """

    id: str
    base: str = ""
    run: str = ""
    created: int = 0
    fingerprint: str = ""

    @property
    def is_base(self) -> bool:
        """Whether others are tuned on it, and it is not tuned itself."""
        return self.id == self.base and not self.run

    @property
    def label(self) -> str:
        """Its name, with its role."""
        return f"{self.id} (base)" if self.is_base else self.id


class Unanswered(Exception):
    """The answer failed; the message is shown to the user.

    Attributes:
        remedy: what helps: `again`, `shorten` the conversation, or choose from the `models`.
    """

    def __init__(self, message: str, remedy: str = "again") -> None:
        super().__init__(message)
        self.remedy = remedy


# Seconds: until a connection, and between two pieces of an answer. Our worker says every few seconds that it is there;
# others may read a long prompt on a CPU meanwhile.
_PATIENCE = httpx.Timeout(120.0, connect=5.0)


def _client() -> openai.AsyncOpenAI:
    return _client_of(settings.PAIRTUNE_BACKEND, settings.PAIRTUNE_KEY)


@lru_cache(maxsize=2)  # a worker that was restarted has another address
def _client_of(backend: str, key: str) -> openai.AsyncOpenAI:
    url = backend.rstrip("/").removesuffix("/v1")
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key or "none", max_retries=0, timeout=_PATIENCE)


@dataclass
class _ModelList:
    """The models of the server, asked for again after two seconds, since every chat page shows them."""

    known: list[Model] = field(default_factory=list)
    asked: float = 0.0

    async def get(self) -> list[Model] | None:
        if self.known and time.monotonic() - self.asked < _LIST_SECONDS:
            return self.known
        try:
            listed = [model async for model in _client().models.list(timeout=_LIST_PATIENCE)]
        except openai.OpenAIError:
            return None
        self.known = list(_different(listed))
        self.asked = time.monotonic()
        return self.known


_LIST_SECONDS, _LIST_PATIENCE = 2, 10
_model_list = _ModelList()


def _different(listed: Iterable[Any]) -> list[Model]:
    """Every model of a run once, by its weights: its winner is listed under the run's name, and its trial's too."""
    found: dict[tuple[str, str], Model] = {}
    for each in listed:
        more = getattr(each, "pairtune", None) or {}
        weights = more.get("fingerprint") or ""
        base = more.get("base") or _base_at_vllm(each)
        model = Model(each.id, base, more.get("run") or "", each.created or 0, weights)
        found.setdefault((model.run, weights or each.id), model)
    return sorted(found.values(), key=lambda model: (model.is_base, -model.created, model.id.count("/")))


def _base_at_vllm(listed: Any) -> str:
    """The base of a model as vLLM lists it: an adapter has a parent, a base model only a root."""
    parent, root = getattr(listed, "parent", None), getattr(listed, "root", None)
    return str(parent or (listed.id if root else ""))


async def models() -> list[Model] | None:
    """List the models, the last tuned ones first and base models last; None if the server cannot be reached."""
    return await _model_list.get()


async def answer(
    model: str, turns: Sequence[Mapping[str, str]], sampling: Mapping[str, Any], *, goes_on: bool = False
) -> AsyncIterator[Part]:
    """Stream an answer.

    Args:
        model: the model's name.
        turns: the conversation.
        sampling: temperature and so on, by OpenAI's names.
        goes_on: whether the last turn is the beginning of the answer, to be continued.

    Raises:
        Unanswered: the server cannot be reached, refuses the request, or fails midway.
    """
    more = {"continue_final_message": True, "add_generation_prompt": False} if goes_on else {}
    ended = False
    try:
        stream = await _client().chat.completions.create(
            model=model,
            messages=list(turns),
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"pairtune": {"queue": True}, **more},
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
    except openai.APITimeoutError as error:
        raise Unanswered("The model server has been silent for two minutes, and was given up. Try again.") from error
    except openai.APIConnectionError as error:
        raise Unanswered("The model server cannot be reached. It may be starting again; try in a moment.") from error
    except openai.NotFoundError as error:
        raise Unanswered(f"The model {model} is no longer available. Choose another one below.", "models") from error
    except openai.RateLimitError as error:
        raise Unanswered("Too many requests are waiting. Try again in a moment.") from error
    except openai.APIError as error:
        if error.code == "context_length_exceeded":
            message = f"This conversation is too long for {model}: {error.message}."
            raise Unanswered(message, "shorten") from error
        raise Unanswered(f"The model server reports: {error.message}") from error
    except Exception as error:
        raise Unanswered("The connection to the model server was lost.") from error
    if not ended:
        raise Unanswered("The model server stopped before the answer was complete.")
