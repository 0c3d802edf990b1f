"""Requests to a scheduler, and the events that it emits for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pairtune.errors import BadInput
from pairtune.models.sampling import SamplingParams


@dataclass(frozen=True)
class TextDelta:
    """The next piece of an answer."""

    text: str


@dataclass(frozen=True)
class QueuePosition:
    """The request is queued behind `ahead` others."""

    ahead: int


@dataclass(frozen=True)
class Finished:
    """The answer is complete.

    Attributes:
        reason: `stop` if the model or a stop string ended it, else `length`.
        tokens: the number of generated tokens.
    """

    reason: Literal["stop", "length"]
    tokens: int


@dataclass(frozen=True)
class Failed:
    """The request failed; no more text follows."""

    message: str


Event = TextDelta | QueuePosition | Finished | Failed


@dataclass(frozen=True)
class Limits:
    """Limits of a scheduler.

    Attributes:
        concurrency: maximum number of running requests.
        waiting: maximum number of queued requests.
        context: maximum tokens of prompt and answer together.
    """

    concurrency: int = 8
    waiting: int = 64
    context: int = 4096


class QueueFull(Exception):
    """The queue is full."""


class SchedulerEnded(Exception):
    """The scheduler takes no more requests."""


class NotBatchable(BadInput):
    """A model or adapter that continuous batching does not support here."""


@dataclass(frozen=True)
class AdapterRef:
    """An adapter's fingerprint and folder."""

    fingerprint: str
    folder: Path


@dataclass(eq=False)
class GenerationRequest:
    """A request to generate one answer.

    Attributes:
        ids: token ids of the rendered prompt.
        params: sampling parameters.
        adapter: the adapter to use; None: the model unchanged.
        tokenizer: the tokenizer of the ids.
        stop_token_ids: tokens that end the answer.
        emit: callback for events, called from the scheduler's thread; it must not block.
        cancelled: whether the request was cancelled.
    """

    ids: list[int]
    params: SamplingParams
    adapter: AdapterRef | None
    tokenizer: Any
    stop_token_ids: frozenset[int]
    emit: Callable[[Event], None]
    cancelled: bool = False
