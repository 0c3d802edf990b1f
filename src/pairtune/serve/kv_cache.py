"""The KV cache: one slot of keys and values per request."""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

_FIRST_CAPACITY = 256  # tokens per slot


@dataclass(frozen=True)
class PrefillChunk:
    """A chunk of a prompt within a batch.

    Attributes:
        slot: the request's slot.
        start: the number of its tokens already cached.
        length: the number of tokens in the chunk.
    """

    slot: int
    start: int
    length: int

    @property
    def end(self) -> int:
        """The number of tokens cached afterwards."""
        return self.start + self.length


@dataclass(frozen=True)
class PrefixCopy:
    """A copy of the first `tokens` cached tokens from one slot to another."""

    source: int
    target: int
    tokens: int


def bytes_per_token(model: PreTrainedModel) -> int:
    """The memory that a token's keys and values take in all layers."""
    layers, heads, size = _sizes(model)
    return 2 * layers * heads * size * int(model.dtype.itemsize)


def _sizes(model: PreTrainedModel) -> tuple[int, int, int]:
    """Layers, KV heads and head size."""
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(config.num_hidden_layers), int(heads), int(size)


class KVCache:
    """Keys and values, [slots, KV heads, tokens, head size] per layer.

    On a CPU every slot has room for the longest request from the start, but takes memory only for the tokens that were
    written to it since it was last taken. Elsewhere the room of all slots grows on demand.

    Args:
        model: the model to cache for.
        slots: the number of concurrent requests.
        context: the most tokens of a request.

    Attributes:
        slots: the number of concurrent requests.
        capacity: how many tokens of a request there is room for.
    """

    def __init__(self, model: PreTrainedModel, slots: int, context: int) -> None:
        self.slots, self._dtype, self._device = slots, model.dtype, model.device
        self._layers, self._heads, self._size = _sizes(model)
        self._written = [0] * slots
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._memory: list[mmap.mmap] = []
        self.capacity = 0
        if self._device.type == "cpu":
            self.capacity = context
            self._keys, self._values = ([self._unused() for _ in range(self._layers)] for _ in range(2))

    @property
    def bytes(self) -> int:
        """Memory taken by what is written."""
        if not self._memory:
            return sum(tensor.nbytes for tensor in [*self._keys, *self._values])
        each = sum(map(len, self._memory)) // (self.slots * self.capacity)
        return each * sum(self._written)

    def reserve(self, ends: Iterable[tuple[int, int]]) -> None:
        """Ensure that there is room for requests.

        Args:
            ends: slots, and how many tokens each of them will hold.
        """
        for slot, tokens in ends:
            self._written[slot] = max(self._written[slot], tokens)
        most = max(self._written)
        if most <= self.capacity:
            return
        capacity = max(most, 2 * self.capacity, _FIRST_CAPACITY)
        shape = (self.slots, self._heads, capacity, self._size)
        grown = []
        for cached in (self._keys, self._values):
            grown.append([torch.zeros(shape, dtype=self._dtype, device=self._device) for _ in range(self._layers)])
            for new, old in zip(grown[-1], cached, strict=False):  # empty at first
                new[:, :, : self.capacity] = old
        (self._keys, self._values), self.capacity, self._memory = grown, capacity, []

    def forget(self, slot: int, tokens: int) -> None:
        """Give back the memory of a slot's tokens after the first `tokens`, where the system offers it."""
        self._written[slot] = min(self._written[slot], tokens)
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        each = self.capacity * self._size * self._dtype.itemsize
        used = tokens * self._size * self._dtype.itemsize
        for memory in self._memory:
            for head in range(slot * self._heads, (slot + 1) * self._heads):
                start, end = head * each + used, (head + 1) * each
                start, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
                if start < end:
                    memory.madvise(mmap.MADV_DONTNEED, start, end - start)

    def _unused(self) -> Tensor:
        """Keys or values of one layer, which take no memory until they are written."""
        shape = (self.slots, self._heads, self.capacity, self._size)
        private = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
        memory = mmap.mmap(-1, math.prod(shape) * self._dtype.itemsize, **private)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            memory.madvise(mmap.MADV_NOHUGEPAGE)  # of 2 MB, of which a short request would use little
        self._memory.append(memory)
        return torch.frombuffer(memory, dtype=self._dtype).view(shape)

    def copy(self, copy: PrefixCopy, layer: int | None = None) -> None:
        """Copy a prefix between slots, in one layer or in all."""
        self._written[copy.target] = max(self._written[copy.target], copy.tokens)
        for cached in (self._keys, self._values):
            for tensor in cached if layer is None else cached[layer : layer + 1]:
                tensor[copy.target, :, : copy.tokens] = tensor[copy.source, :, : copy.tokens]

    def write_chunk(self, layer: int, chunk: PrefillChunk, key: Tensor, value: Tensor) -> None:
        """Cache a chunk's keys and values, [KV heads, length, head size]."""
        span = slice(chunk.start, chunk.end)
        self._keys[layer][chunk.slot, :, span], self._values[layer][chunk.slot, :, span] = key, value

    def read_chunk(self, layer: int, chunk: PrefillChunk) -> tuple[Tensor, Tensor]:
        """Views of a request's keys and values up to the end of a chunk, [KV heads, tokens, head size]."""
        return self._keys[layer][chunk.slot, :, : chunk.end], self._values[layer][chunk.slot, :, : chunk.end]

    def write_tokens(self, layer: int, slots: Tensor, positions: Tensor, key: Tensor, value: Tensor) -> None:
        """Cache one token for each of several requests, [requests, KV heads, head size]."""
        self._keys[layer][slots, :, positions], self._values[layer][slots, :, positions] = key, value

    def read_slots(self, layer: int, first: int, count: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Views of the keys and values of adjacent slots, [count, KV heads, tokens, head size]."""
        slots = slice(first, first + count)
        return self._keys[layer][slots, :, :tokens], self._values[layer][slots, :, :tokens]
