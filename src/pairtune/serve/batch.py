"""Continuous batching (Yu et al. 2022, "Orca") of the requests to one model.

Each forward pass has one token of every decoding request, so a request joins with the next pass and leaves when its
answer ends, whatever the others do. A long prompt is prefilled in chunks alongside (Agrawal et al. 2023, "Sarathi"). A
prefix that is still in the KV cache (its own earlier turns, a system message) is not computed again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pairtune.errors import BadInput, one_line
from pairtune.serve.adapter_cache import AdapterCache
from pairtune.serve.cache_slots import CachedPrefix, CacheSlots, shared_prefix
from pairtune.serve.detokenizer import IncrementalDetokenizer
from pairtune.serve.kv_cache import PrefillChunk, PrefixCopy
from pairtune.serve.model_runner import DecodeToken, ModelRunner, PromptChunk
from pairtune.serve.request import Event, Failed, Finished, GenerationRequest, TextDelta

log = logging.getLogger(__name__)

# Prompt tokens per pass: enough for efficient products, few enough that decoding requests are hardly delayed.
PREFILL_TOKENS = 512


@dataclass(eq=False)
class _Running:
    """A request with a slot."""

    request: GenerationRequest
    detokenizer: IncrementalDetokenizer
    generator: torch.Generator
    slot: int
    ids: list[int]  # prompt and answer; the last token is still to be decoded
    cached: int  # tokens in the KV cache
    generated: int = 0

    @property
    def adapter(self) -> str | None:
        return self.request.adapter.fingerprint if self.request.adapter else None

    @property
    def prefilled(self) -> bool:
        return self.generated > 0 or self.cached == len(self.request.ids)

    @property
    def prefix(self) -> CachedPrefix:
        return CachedPrefix(self.adapter, self.ids[: self.cached])

    def emit(self, event: Event) -> None:
        self.request.emit(event)


class ContinuousBatch:
    """The requests that a model is answering. Belongs to one thread.

    Args:
        runner: the model with its KV cache, whose slots this batch takes over.
        adapters: how many adapters to keep in memory; exceeded only while more of them are in use.
    """

    def __init__(self, runner: ModelRunner, adapters: int = 16) -> None:
        self._runner = runner
        self._adapters = AdapterCache(runner.adapters, runner.model.dtype, runner.model.device, adapters)
        self._slots = CacheSlots(runner.cache.slots)
        self._running: list[_Running] = []

    @property
    def running(self) -> int:
        """The number of requests that have a slot."""
        return len(self._running)

    @property
    def free(self) -> int:
        """The number of free slots."""
        return self._slots.available

    def admit(self, request: GenerationRequest) -> None:
        """Give a request a free slot; an error fails this request only."""
        try:
            if request.adapter:
                self._adapters.use(request.adapter, {each.adapter for each in self._running if each.adapter})
            detokenizer = IncrementalDetokenizer(request.tokenizer, request.params.stop)
            generator = request.params.generator()
        except BadInput as error:
            request.emit(Failed(str(error)))
            return
        except Exception as error:
            log.exception("a request failed")
            request.emit(Failed(one_line(error, 200)))
            return
        adapter = request.adapter.fingerprint if request.adapter else None
        in_use = {each.slot: each.prefix for each in self._running}
        assigned = self._slots.take(adapter, request.ids, in_use)
        self._runner.cache.forget(assigned.slot, assigned.tokens if assigned.source == assigned.slot else 0)
        if assigned.source != assigned.slot and assigned.tokens:
            self._runner.cache.copy(PrefixCopy(assigned.source, assigned.slot, assigned.tokens))
        ids = list(request.ids)
        self._running.append(_Running(request, detokenizer, generator, assigned.slot, ids, assigned.tokens))

    def step(self) -> None:
        """Run one forward pass: a token of every decoding request, and chunks of the prompts in prefill."""
        for each in [each for each in self._running if each.request.cancelled]:
            self._release(each)
        decoding = sorted((each for each in self._running if each.prefilled), key=lambda each: each.slot)
        prefilling, copies = self._chunks([each for each in self._running if not each.prefilled])
        if not decoding and not prefilling:
            return
        logits = self._runner.forward(
            [DecodeToken(each.slot, each.ids[-1], each.cached, each.adapter) for each in decoding],
            [
                PromptChunk(chunk, each.ids[chunk.start : chunk.end], each.adapter, chunk.end == len(each.ids))
                for each, chunk in prefilling
            ],
            copies,
        )
        for each in decoding:
            each.cached += 1
        for each, chunk in prefilling:
            each.cached = chunk.end
        sampling = decoding + [each for each, _ in prefilling if each.prefilled]
        for each, row in zip(sampling, logits, strict=True):
            try:
                self._sample(each, row)
            except Exception as error:
                log.exception("an answer failed")
                each.emit(Failed(one_line(error, 200)))
                self._release(each)

    def fail(self, message: str) -> None:
        """Fail all requests that have a slot, and forget what is cached, which is unreliable after a failed pass."""
        running, self._running = self._running, []
        self._slots.clear()
        for each in running:
            each.emit(Failed(message))

    def _chunks(self, prefilling: Sequence[_Running]) -> tuple[list[tuple[_Running, PrefillChunk]], list[PrefixCopy]]:
        """The prompt chunks of the next pass, and the prefixes that they share."""
        chunks: list[tuple[_Running, PrefillChunk]] = []
        copies, budget = [], PREFILL_TOKENS
        for each in prefilling:
            if copy := _shared_chunk(each, chunks):
                each.cached = copy.tokens
                copies.append(copy)
            length = min(budget, len(each.ids) - each.cached)
            if length:
                chunks.append((each, PrefillChunk(each.slot, each.cached, length)))
            budget -= length
        return chunks, copies

    def _sample(self, each: _Running, logits: torch.Tensor) -> None:
        """Sample the next token; at the answer's end, release the slot."""
        params = each.request.params
        token = params.sample(logits, each.generator)
        ended = token in each.request.stop_token_ids
        if not ended:
            each.ids.append(token)
            each.generated += 1
            if text := each.detokenizer.push(token):
                each.emit(TextDelta(text))
            ended = each.detokenizer.stopped
            if not ended and each.generated < params.max_tokens:
                return
        if rest := each.detokenizer.flush():
            each.emit(TextDelta(rest))
        each.emit(Finished("stop" if ended or each.detokenizer.stopped else "length", each.generated))
        self._release(each)

    def _release(self, each: _Running) -> None:
        self._running.remove(each)
        self._slots.release(each.slot, each.prefix)


def _shared_chunk(each: _Running, chunks: Sequence[tuple[_Running, PrefillChunk]]) -> PrefixCopy | None:
    """The longest prefix that a prompt shares with one prefilled in the same pass, if it saves work."""
    known = [
        (min(shared_prefix(other.ids, each.ids[:-1]), chunk.end), chunk.slot)
        for other, chunk in chunks
        if other.adapter == each.adapter
    ]
    tokens, source = max(known, default=(0, 0))
    return PrefixCopy(source, each.slot, tokens) if tokens > each.cached else None
