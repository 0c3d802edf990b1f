"""Continuous batching (Yu et al. 2022, "Orca"): one model, and every request that it is answering.

A thread of its own makes one forward pass after the other. A new request joins the next pass and a finished one leaves
it, so nobody waits for another's answer to end. A long prompt is prefilled in chunks between the others' tokens, and
what it shares with a conversation that is still in the KV cache is not computed again: its own earlier turns, a system
message.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
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
    TextDelta,
)

log = logging.getLogger(__name__)

# Prompt tokens in a pass: enough to multiply well, few enough that those who are being answered hardly notice.
PREFILL_TOKENS = 512

# Seconds to wait for requests that come at the same moment, where nothing is running.
_GATHERING_SECONDS = 0.005


@dataclass(eq=False)
class _Running:
    """A request that has a slot."""

    request: GenerationRequest
    detokenizer: IncrementalDetokenizer
    generator: torch.Generator
    slot: int
    ids: list[int]  # prompt and answer; the answer's last token has not been through the model
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
    """See the module; `submit` and `cancel` may be called from any thread.

    Args:
        model: of transformers, changed in place; a base model, or a whole tuned one.
        limits: of what is taken on.

    Raises:
        NotBatchable: the attention of the model's family cannot be batched here.
    """

    def __init__(self, model: PreTrainedModel, limits: Limits) -> None:
        self.runner = ModelRunner(model, limits.concurrency)
        context = min(limits.context, getattr(model.config, "max_position_embeddings", limits.context))
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
        """Take a request on; its events follow.

        Raises:
            QueueFull: too many are waiting.
        """
        with self._changed:
            if len(self._waiting) >= self.limits.waiting:
                raise QueueFull
            self._waiting.append(request)
            request.emit(QueuePosition(0 if self._slots.available else len(self._waiting) - 1))
            self._changed.notify()

    def cancel(self, request: GenerationRequest) -> None:
        """Nobody wants the answer any more: its slot is free from the next pass on."""
        request.cancelled = True
        with self._changed:
            if request in self._waiting:
                self._waiting.remove(request)
                self._emit_positions()

    def close(self) -> None:
        """End the thread; every request that is not finished fails."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    @property
    def load(self) -> dict[str, int]:
        """How much is going on."""
        return {
            "running": len(self._running),
            "waiting": len(self._waiting),
            "kv_cache_bytes": self.runner.cache.bytes,
        }

    def _emit_positions(self) -> None:
        for ahead, request in enumerate(self._waiting):
            request.emit(QueuePosition(ahead))

    # The scheduler's thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with torch.inference_mode():
            while (admitted := self._next()) is not None:
                try:
                    for request in admitted:
                        self._admit(request)
                    self._step()
                except Exception as error:
                    log.exception("a forward pass failed")
                    self._fail_all(f"the model failed ({one_line(error, 200)})")
                    self._slots.clear()  # what the pass has left there is not to be trusted
        self._fail_all("the server is closing")
        for request in self._waiting:
            request.emit(Failed("the server is closing"))

    def _next(self) -> list[GenerationRequest] | None:
        """Requests that join the next pass; waits until there is something to do. None: the scheduler is closed."""
        with self._changed:
            if not self._running:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                # Requests that come together are prefilled together, which is faster for all but the first.
                full = self._slots.available
                self._changed.wait_for(lambda: self._closed or len(self._waiting) >= full, _GATHERING_SECONDS)
            if self._closed:
                return None
            admitted = [self._waiting.popleft() for _ in range(self._slots.available) if self._waiting]
            if admitted:
                self._emit_positions()
            return admitted

    def _fail_all(self, message: str) -> None:
        running, self._running = self._running, []
        for each in running:
            each.emit(Failed(message))

    def _admit(self, request: GenerationRequest) -> None:
        """Give a request a slot; whatever is wrong with it is its own matter."""
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
        if assigned.source != assigned.slot and assigned.tokens:
            self.runner.cache.copy(PrefixCopy(assigned.source, assigned.slot, assigned.tokens))
        ids = list(request.ids)
        self._running.append(_Running(request, detokenizer, generator, assigned.slot, ids, assigned.tokens))

    def _step(self) -> None:
        """One forward pass: a token of every answer, and chunks of the prompts that have come in."""
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
        """What is computed of the prompts in the next pass, and what they take over from one another."""
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
        """The next token of an answer; at its end the slot is released."""
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
    """What a prompt need not compute because another one that is prefilled in the same pass begins alike."""
    known = [
        (min(shared_prefix(other.ids, each.ids[:-1]), chunk.end), chunk.slot)
        for other, chunk in chunks
        if other.adapter == each.adapter
    ]
    tokens, source = max(known, default=(0, 0))
    return PrefixCopy(source, each.slot, tokens) if tokens > each.cached else None
