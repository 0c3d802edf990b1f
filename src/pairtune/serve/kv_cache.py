"""The KV cache: one slot of keys and values per request."""

from __future__ import annotations

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


class KVCache:
    """Keys and values, [slots, KV heads, tokens, head size] per layer; the capacity grows on demand.

    Args:
        model: the model to cache for.
        slots: the number of concurrent requests.
    """

    def __init__(self, model: PreTrainedModel, slots: int) -> None:
        config = model.config
        self._slots, self._dtype, self._device = slots, model.dtype, model.device
        self._heads = config.num_key_value_heads
        self._size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._layers = config.num_hidden_layers
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self.capacity = 0

    @property
    def bytes(self) -> int:
        """Allocated memory."""
        return sum(tensor.nbytes for tensor in [*self._keys, *self._values])

    def reserve(self, tokens: int) -> None:
        """Ensure that every slot can hold this many tokens."""
        if tokens <= self.capacity:
            return
        capacity = max(tokens, 2 * self.capacity, _FIRST_CAPACITY)
        shape = (self._slots, self._heads, capacity, self._size)
        grown = []
        for cached in (self._keys, self._values):
            grown.append([torch.zeros(shape, dtype=self._dtype, device=self._device) for _ in range(self._layers)])
            for new, old in zip(grown[-1], cached, strict=False):  # empty at first
                new[:, :, : self.capacity] = old
        (self._keys, self._values), self.capacity = grown, capacity

    def copy(self, copy: PrefixCopy, layer: int | None = None) -> None:
        """Copy a prefix between slots, in one layer or in all."""
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
