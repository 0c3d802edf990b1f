"""What is asked of a scheduler, and the events that answer it."""

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
    """Still waiting, with so many requests ahead."""

    ahead: int


@dataclass(frozen=True)
class Finished:
    """The answer is complete.

    Attributes:
        reason: `stop`, where the model or a stop text ended it, or `length`.
        tokens: how many it has.
    """

    reason: Literal["stop", "length"]
    tokens: int


@dataclass(frozen=True)
class Failed:
    """There will be no (more) answer."""

    message: str


Event = TextDelta | QueuePosition | Finished | Failed


@dataclass(frozen=True)
class Limits:
    """What a scheduler takes on.

    Attributes:
        concurrency: requests answered at once.
        waiting: requests that may wait beyond these.
        context: tokens of a prompt and its answer together.
    """

    concurrency: int = 8
    waiting: int = 64
    context: int = 4096


class QueueFull(Exception):
    """Too many requests are waiting already."""


class NotBatchable(BadInput):
    """A model or an adapter that cannot share a batch with others here."""


@dataclass(frozen=True)
class AdapterRef:
    """An adapter by the fingerprint of its weights, and the folder that it is read from."""

    fingerprint: str
    folder: Path


@dataclass(eq=False)
class GenerationRequest:
    """One answer that somebody wants.

    Attributes:
        ids: token ids of the rendered prompt.
        params: how to sample.
        adapter: None: the model as it is.
        tokenizer: that made the ids.
        stop_token_ids: tokens that end the answer.
        emit: called with every event, from the scheduler's thread; it must not block.
        cancelled: nobody wants the answer any more.
    """

    ids: list[int]
    params: SamplingParams
    adapter: AdapterRef | None
    tokenizer: Any
    stop_token_ids: frozenset[int]
    emit: Callable[[Event], None]
    cancelled: bool = False
