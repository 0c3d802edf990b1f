"""The processes that share a run's work: one, unless a launcher (`torchrun`) started several.

Each batch is divided among them and the gradients are summed, so that the result is that of one process. All processes
make the same decisions from the same numbers; only the first one writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain, zip_longest
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce
from torch import Tensor

T = TypeVar("T")


class Processes:
    """The current process and its siblings, through Accelerate.

    Args:
        device: the device that the run computes on.
    """

    def __init__(self, device: torch.device) -> None:
        # While the first process writes checkpoints, answers prompts and reports, the others wait.
        self._state = PartialState(cpu=device.type == "cpu", timeout=timedelta(days=1))
        self.count = self._state.num_processes
        self.first = self._state.is_main_process

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """The process's part of the work: every `count`-th item, starting at the process index."""
        return items[self._state.process_index :: self.count]

    def gather(self, shared: list[Any]) -> list[Any]:
        """The results of all processes' shards, in the order of the sharded items."""
        if self.count == 1:
            return shared
        missing = object()
        rounds = zip_longest(*gather_object([shared]), fillvalue=missing)
        return [item for item in chain.from_iterable(rounds) if item is not missing]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return any(gather_object([flag])) if self.count > 1 else flag

    def from_first(self, value: T) -> T:
        """The first process's value."""
        if self.count == 1:
            return value
        values = [value]
        broadcast_object_list(values)
        return values[0]

    def add_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace each gradient by its sum over all processes; a missing gradient counts as 0."""
        if self.count == 1 or not parameters:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat: Tensor = reduce(torch.cat([gradient.flatten() for gradient in gradients]), "sum")
        for parameter, total in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = total.view_as(parameter)

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """Run the body in the first process first: it fills the caches that the others read."""
        with self._state.main_process_first():
            yield

    def wait(self) -> None:
        """Wait until all processes have reached this call."""
        self._state.wait_for_everyone()
