"""The adapters that are in memory: the least recently used one goes when there are too many."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

import torch

from pairtune.serve.adapters import AdapterStack, read_adapter
from pairtune.serve.request import AdapterRef


class AdapterCache:
    """Adapters by their fingerprints, in the order of their last use.

    Args:
        stack: of the model that they belong to.
        dtype: of the model.
        device: that it is on.
        size: how many are kept; more only while all of them are in use.
    """

    def __init__(self, stack: AdapterStack, dtype: torch.dtype, device: torch.device, size: int = 16) -> None:
        self._stack, self._dtype, self._device, self._size = stack, dtype, device, size

    def use(self, adapter: AdapterRef, in_use: AbstractSet[str]) -> None:
        """Load an adapter where it is not in memory, and make it the most recently used one.

        Args:
            adapter: to be used.
            in_use: fingerprints of those that conversations have.

        Raises:
            BadInput: it cannot be loaded, or does not belong to this model.
        """
        adapters = self._stack.adapters
        before = list(adapters)
        loaded = adapters.pop(adapter.fingerprint, None)
        adapters[adapter.fingerprint] = loaded or read_adapter(adapter.folder, self._dtype, self._device)
        idle = [key for key in adapters if key != adapter.fingerprint and key not in in_use]
        for key in idle[: max(0, len(adapters) - self._size)]:
            del adapters[key]
        if list(adapters) != before:
            self._stack.set(adapters)
