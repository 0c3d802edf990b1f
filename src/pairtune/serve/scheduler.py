"""Continuous batching (Yu et al. 2022, "Orca") of the requests to one model.

The scheduler's thread runs one forward pass after the other. A new request joins the next pass and a finished one
leaves it, so no request waits for another's answer to end. A long prompt is prefilled in chunks alongside the decoding
of other requests, and a prefix that is still in the KV cache (its own earlier turns, a system message) is not computed
again.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from pairtune.errors import BadInput, one_line
from pairtune.serve.adapter_cache import AdapterCache
from pairtune.serve.cache_slots import CachedPrefix, CacheSlots, shared_prefix
from pairtune.serve.detokenizer import IncrementalDetokenizer
from pairtune.serve.kv_cache import PrefillChunk, PrefixCopy
from pairtune.serve.model_runner import DecodeToken, ModelRunner, PromptChunk
from pairtune.serve.request import (
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Limits,
    QueueFull,
    QueuePosition,
    SchedulerEnded,
    TextDelta,
)

log = logging.getLogger(__name__)

# Prompt tokens per pass: enough for efficient products, few enough that decoding requests are hardly delayed.
PREFILL_TOKENS = 512

# Seconds to wait for simultaneous requests when nothing is running.
_GATHERING_SECONDS = 0.005


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


class BatchScheduler:
    """Schedules requests to one model; `submit` and `cancel` may be called from any thread.

    Args:
        model: a transformers model, base or fully tuned; it is modified in place.
        limits: the limits on requests.

    Raises:
        NotBatchable: the attention of the model's family cannot be batched here.
    """

    def __init__(self, model: PreTrainedModel, limits: Limits) -> None:
        context = min(limits.context, getattr(model.config, "max_position_embeddings", limits.context))
        self.runner = ModelRunner(model, limits.concurrency, context)
        self.limits = Limits(limits.concurrency, limits.waiting, context)
        self._adapters = AdapterCache(self.runner.adapters, model.dtype, model.device)
        self._slots = CacheSlots(limits.concurrency)
        self._waiting: deque[GenerationRequest] = deque()
        self._running: list[_Running] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="pairtune-scheduler", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request; its events follow.

        Raises:
            QueueFull: too many requests are waiting.
            SchedulerEnded: the scheduler was closed, or its thread has died.
        """
        with self._changed:
            if not self.alive:
                raise SchedulerEnded
            if len(self._waiting) >= self.limits.waiting:
                raise QueueFull
            self._waiting.append(request)
            request.emit(QueuePosition(0 if self._slots.available else len(self._waiting) - 1))
            self._changed.notify()

    def cancel(self, request: GenerationRequest) -> None:
        """Cancel a request; its slot is freed before the next pass."""
        request.cancelled = True
        with self._changed:
            if request in self._waiting:
                self._waiting.remove(request)
                self._emit_positions()

    def close(self) -> None:
        """Stop the thread; unfinished requests fail."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether it answers requests."""
        return not self._closed and self._thread.is_alive()

    @property
    def load(self) -> dict[str, int]:
        """The numbers of running and waiting requests, the KV cache's size, and whether it answers requests (1)."""
        return {
            "alive": int(self.alive),
            "running": len(self._running),
            "waiting": len(self._waiting),
            "kv_cache_bytes": self.runner.cache.bytes,
        }

    def _emit_positions(self) -> None:
        for ahead, request in enumerate(self._waiting):
            request.emit(QueuePosition(ahead))

    # The scheduler's thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while (admitted := self._next()) is not None:
                    try:
                        while admitted:
                            self._admit(admitted[0])
                            admitted.popleft()
                        self._step()
                    except Exception as error:
                        log.exception("a forward pass failed")
                        self._fail_all(f"the model failed ({one_line(error, 200)})", admitted)
                        self._slots.clear()  # their content is unreliable after a failed pass
        finally:  # also when the thread dies: nobody waits for it any more
            with self._changed:
                self._closed = True
                self._fail_all("the server is closing", self._waiting)
                self._waiting.clear()

    def _next(self) -> deque[GenerationRequest] | None:
        """Wait for work and return the requests that join the next pass; None: the scheduler is closed."""
        with self._changed:
            if not self._running:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                # Simultaneous requests are prefilled together, which is faster for all but the first.
                full = self._slots.available
                self._changed.wait_for(lambda: self._closed or len(self._waiting) >= full, _GATHERING_SECONDS)
            if self._closed:
                return None
            admitted = deque(self._waiting.popleft() for _ in range(self._slots.available) if self._waiting)
            if admitted:
                self._emit_positions()
            return admitted

    def _fail_all(self, message: str, others: Iterable[GenerationRequest]) -> None:
        """Fail the requests with a slot, and others."""
        running, self._running = self._running, []
        for request in (*(each.request for each in running), *others):
            request.emit(Failed(message))

    def _admit(self, request: GenerationRequest) -> None:
        """Give a request a slot; an error fails this request only."""
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
        self.runner.cache.forget(assigned.slot, assigned.tokens if assigned.source == assigned.slot else 0)
        if assigned.source != assigned.slot and assigned.tokens:
            self.runner.cache.copy(PrefixCopy(assigned.source, assigned.slot, assigned.tokens))
        ids = list(request.ids)
        self._running.append(_Running(request, detokenizer, generator, assigned.slot, ids, assigned.tokens))

    def _step(self) -> None:
        """Run one forward pass: a token of every decoding request, and chunks of the prompts in prefill."""
        for each in [each for each in self._running if each.request.cancelled]:
            self._release(each)
        decoding = sorted((each for each in self._running if each.prefilled), key=lambda each: each.slot)
        prefilling, copies = self._chunks([each for each in self._running if not each.prefilled])
        if not decoding and not prefilling:
            return
        logits = self.runner.forward(
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
