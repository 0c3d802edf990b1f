"""The KV cache: keys and values of many conversations, each in a slot of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

_FIRST_CAPACITY = 256  # tokens of a slot


@dataclass(frozen=True)
class PrefillChunk:
    """Some tokens of a prompt, in a batch.

    Attributes:
        slot: of the conversation.
        start: how many of its tokens are cached already.
        length: how many come now.
    """

    slot: int
    start: int
    length: int

    @property
    def end(self) -> int:
        """How many are cached afterwards."""
        return self.start + self.length


@dataclass(frozen=True)
class PrefixCopy:
    """The first tokens of one conversation are those of another: from slot to slot."""

    source: int
    target: int
    tokens: int


class KVCache:
    """Keys and values, [slots, key heads, tokens, head size] a layer; capacity grows as it is needed.

    Args:
        model: whose layers they are.
        slots: conversations at once.
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
        """Memory taken."""
        return sum(tensor.nbytes for tensor in [*self._keys, *self._values])

    def reserve(self, tokens: int) -> None:
        """Let every slot hold so many tokens."""
        if tokens <= self.capacity:
            return
        capacity = max(tokens, 2 * self.capacity, _FIRST_CAPACITY)
        shape = (self._slots, self._heads, capacity, self._size)
        grown = []
        for cached in (self._keys, self._values):
            grown.append([torch.zeros(shape, dtype=self._dtype, device=self._device) for _ in range(self._layers)])
            for new, old in zip(grown[-1], cached, strict=False):  # at first there is nothing old
                new[:, :, : self.capacity] = old
        (self._keys, self._values), self.capacity = grown, capacity

    def copy(self, copy: PrefixCopy, layer: int | None = None) -> None:
        """Give one conversation another's beginning; in one layer, or in all."""
        for cached in (self._keys, self._values):
            for tensor in cached if layer is None else cached[layer : layer + 1]:
                tensor[copy.target, :, : copy.tokens] = tensor[copy.source, :, : copy.tokens]

    def write_chunk(self, layer: int, chunk: PrefillChunk, key: Tensor, value: Tensor) -> None:
        """Cache a chunk's keys and values, [key heads, length, head size]."""
        place = slice(chunk.start, chunk.end)
        self._keys[layer][chunk.slot, :, place], self._values[layer][chunk.slot, :, place] = key, value

    def read_chunk(self, layer: int, chunk: PrefillChunk) -> tuple[Tensor, Tensor]:
        """Keys and values of a conversation up to the end of a chunk, [key heads, tokens, head size]; views."""
        return self._keys[layer][chunk.slot, :, : chunk.end], self._values[layer][chunk.slot, :, : chunk.end]

    def write_tokens(self, layer: int, slots: Tensor, positions: Tensor, key: Tensor, value: Tensor) -> None:
        """Cache one token each of some conversations, [conversations, key heads, head size]."""
        self._keys[layer][slots, :, positions], self._values[layer][slots, :, positions] = key, value

    def read_slots(self, layer: int, first: int, count: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values of neighbouring slots, [count, key heads, tokens, head size]; views."""
        slots = slice(first, first + count)
        return self._keys[layer][slots, :, :tokens], self._values[layer][slots, :, :tokens]
