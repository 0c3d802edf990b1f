"""Allocation of KV cache slots to requests, with prefix caching in free slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count


@dataclass(frozen=True)
class CachedPrefix:
    """The tokens cached in a slot and the adapter they were computed with (None: the base model)."""

    adapter: str | None
    ids: Sequence[int]

    def shared_with(self, adapter: str | None, ids: Sequence[int]) -> int:
        """The number of a prompt's tokens that need not be computed again."""
        return shared_prefix(self.ids, ids) if adapter == self.adapter else 0


@dataclass(frozen=True)
class Assignment:
    """The slot of a new request.

    Attributes:
        slot: the request's slot.
        source: the slot that holds the longest prefix of its prompt.
        tokens: the length of that prefix.
    """

    slot: int
    source: int
    tokens: int


@dataclass
class CacheSlots:
    """The slots 0 to `size` - 1. Free slots keep their content until they are taken, least recently used first."""

    size: int
    _free: dict[int, CachedPrefix] = field(default_factory=dict)
    _released: dict[int, int] = field(default_factory=dict)  # release time, by slot
    _clock: count[int] = field(default_factory=count)

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Free all slots and discard their content."""
        self._free = {slot: CachedPrefix(None, ()) for slot in range(self.size)}
        self._released = dict.fromkeys(range(self.size), -1)

    @property
    def available(self) -> int:
        """The number of free slots."""
        return len(self._free)

    def take(self, adapter: str | None, ids: Sequence[int], in_use: Mapping[int, CachedPrefix]) -> Assignment:
        """Assign a free slot to a request.

        A prompt's last token is always computed, since its logits give the first token of the answer.

        Args:
            adapter: the request's adapter.
            ids: its prompt.
            in_use: cached prefixes of the running requests, by slot.
        """
        shared = {slot: each.shared_with(adapter, ids[:-1]) for slot, each in {**in_use, **self._free}.items()}
        source = max(shared, key=shared.__getitem__)
        reused = source in self._free and shared[source] > 0
        slot = source if reused else min(self._free, key=self._released.__getitem__)
        del self._free[slot]
        return Assignment(slot, source, shared[source])

    def release(self, slot: int, content: CachedPrefix) -> None:
        """Free the slot of a request that has ended; its content is kept for reuse."""
        self._free[slot], self._released[slot] = content, next(self._clock)


def shared_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the longest common prefix."""
    size = min(len(one), len(other))
    return next((index for index in range(size) if one[index] != other[index]), size)
