"""Answers to many questions at once, for reports: in continuous batches, without a thread or a queue."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pairtune.errors import RunFailed
from pairtune.footprint import ANSWERS_AT_ONCE
from pairtune.models.generate import end_tokens
from pairtune.models.load import free_bytes
from pairtune.models.sampling import SamplingParams
from pairtune.run.records import Answer
from pairtune.serve.batch import ContinuousBatch
from pairtune.serve.kv_cache import bytes_per_token
from pairtune.serve.model_runner import ModelRunner
from pairtune.serve.request import AdapterRef, Event, Failed, Finished, GenerationRequest, TextDelta

# The share of the free memory that the KV cache may take.
_SHARE = 0.25
# Questions come model by model, so only few adapters are in use at a time, and every one in memory costs time.
_ADAPTERS = 4


@dataclass(frozen=True)
class Question:
    """A question to a model.

    Attributes:
        ids: token ids of the rendered prompt.
        params: sampling parameters.
        adapter: the adapter that answers; None: the model unchanged.
    """

    ids: list[int]
    params: SamplingParams
    adapter: AdapterRef | None = None


@dataclass
class _Collected:
    """An answer as it comes."""

    pieces: list[str] = field(default_factory=list)
    ended: Finished | Failed | None = None

    def take(self, event: Event) -> None:
        if isinstance(event, TextDelta):
            self.pieces.append(event.text)
        elif isinstance(event, Finished | Failed):
            self.ended = event

    def answer(self) -> Answer:
        if isinstance(self.ended, Failed):
            raise RunFailed(f"an answer failed ({self.ended.message})")
        assert self.ended is not None  # noqa: S101 - asked for once it has ended
        text = "".join(self.pieces).strip()
        return Answer(text=text, tokens=self.ended.tokens, ended=self.ended.reason == "stop")


def answer_all(
    runner: ModelRunner,
    tokenizer: Any,
    questions: Sequence[Question],
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Answer]:
    """Answer all questions with one model and its adapters; those to one adapter should stand together.

    With seeds the same questions give the same answers on the same machine, as long as as many fit in its memory.

    Args:
        runner: the model; its KV cache is replaced.
        tokenizer: the tokenizer of the questions.
        questions: the questions.
        on_progress: called with the number of answers so far.

    Returns:
        The answers, in the order of the questions.

    Raises:
        RunFailed: an adapter cannot be loaded, or a token cannot be sampled.
    """
    longest = max((len(each.ids) + each.params.max_tokens for each in questions), default=1)
    runner.resize(_slots(runner, longest, len(questions)), longest)
    batch, ends = ContinuousBatch(runner, _ADAPTERS), frozenset(end_tokens(runner.model, tokenizer))
    collected = [_Collected() for _ in questions]
    waiting = deque(
        GenerationRequest(each.ids, each.params, each.adapter, tokenizer, ends, to.take)
        for each, to in zip(questions, collected, strict=True)
    )
    done = 0
    with torch.inference_mode():
        while waiting or batch.running:
            while waiting and batch.free:
                batch.admit(waiting.popleft())
            batch.step()
            if (count := sum(each.ended is not None for each in collected)) > done:
                done = count
                on_progress(done)
    return [each.answer() for each in collected]


def _slots(runner: ModelRunner, longest: int, count: int) -> int:
    """How many questions are answered at once."""
    room = _SHARE * free_bytes(runner.model.device) // (bytes_per_token(runner.model) * longest)
    return int(max(1, min(ANSWERS_AT_ONCE, count, room)))
