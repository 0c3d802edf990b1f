"""Serves one model: a thread that runs one forward pass after the other for the requests of all others.

A new request joins the next pass and a finished one leaves it (`batch.ContinuousBatch`), so no request waits for
another's answer to end.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from pairtune.errors import one_line
from pairtune.serve.batch import ContinuousBatch
from pairtune.serve.model_runner import ModelRunner
from pairtune.serve.request import Failed, GenerationRequest, Limits, QueueFull, QueuePosition, SchedulerEnded

log = logging.getLogger(__name__)

# Seconds to wait for simultaneous requests when nothing is running.
_GATHERING_SECONDS = 0.005


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
        self._batch = ContinuousBatch(self.runner)
        self._waiting: deque[GenerationRequest] = deque()
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
            request.emit(QueuePosition(0 if self._batch.free else len(self._waiting) - 1))
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
            "running": self._batch.running,
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
                            self._batch.admit(admitted[0])
                            admitted.popleft()
                        self._batch.step()
                    except Exception as error:
                        log.exception("a forward pass failed")
                        self._fail_all(f"the model failed ({one_line(error, 200)})", admitted)
        finally:  # also when the thread dies: nobody waits for it any more
            with self._changed:
                self._closed = True
                self._fail_all("the server is closing", self._waiting)
                self._waiting.clear()

    def _next(self) -> deque[GenerationRequest] | None:
        """Wait for work and return the requests that join the next pass; None: the scheduler is closed."""
        with self._changed:
            if not self._batch.running:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                # Simultaneous requests are prefilled together, which is faster for all but the first.
                full = self._batch.free
                self._changed.wait_for(lambda: self._closed or len(self._waiting) >= full, _GATHERING_SECONDS)
            if self._closed:
                return None
            admitted = deque(self._waiting.popleft() for _ in range(self._batch.free) if self._waiting)
            if admitted:
                self._emit_positions()
            return admitted

    def _fail_all(self, message: str, others: Iterable[GenerationRequest]) -> None:
        """Fail the requests with a slot, and others."""
        self._batch.fail(message)
        for request in others:
            request.emit(Failed(message))
