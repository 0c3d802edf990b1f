"""An LRU cache of the adapters in memory."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

import torch

from pairtune.serve.adapters import AdapterStack, read_adapter
from pairtune.serve.request import AdapterRef


class AdapterCache:
    """Adapters keyed by fingerprint, ordered by last use.

    Args:
        stack: the adapter stack of their model.
        dtype: the model's dtype.
        device: the model's device.
        size: how many adapters to keep; exceeded only while all of them are in use.
    """

    def __init__(self, stack: AdapterStack, dtype: torch.dtype, device: torch.device, size: int = 16) -> None:
        self._stack, self._dtype, self._device, self._size = stack, dtype, device, size

    def use(self, adapter: AdapterRef, in_use: AbstractSet[str]) -> None:
        """Load an adapter unless it is in memory, and mark it as most recently used.

        Args:
            adapter: the adapter to use.
            in_use: fingerprints of the adapters of running requests.

        Raises:
            BadInput: the adapter cannot be loaded, or was made for another model.
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
