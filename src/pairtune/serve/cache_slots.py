"""Which conversation has which slot of the KV cache, and what free slots still hold (prefix caching)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count


@dataclass(frozen=True)
class CachedPrefix:
    """Tokens whose keys and values lie in a slot, computed under one adapter (None: the base)."""

    adapter: str | None
    ids: Sequence[int]

    def shared_with(self, adapter: str | None, ids: Sequence[int]) -> int:
        """How many tokens of a prompt need not be computed again."""
        return shared_prefix(self.ids, ids) if adapter == self.adapter else 0


@dataclass(frozen=True)
class Assignment:
    """The slot of a new conversation.

    Attributes:
        slot: its own.
        source: the slot that holds the beginning of its prompt.
        tokens: how many tokens that beginning has.
    """

    slot: int
    source: int
    tokens: int


@dataclass
class CacheSlots:
    """The slots 0 to `size` - 1. Free slots keep their content until they are taken: the longest unused one first."""

    size: int
    _free: dict[int, CachedPrefix] = field(default_factory=dict)
    _released: dict[int, int] = field(default_factory=dict)  # when, by slot
    _clock: count[int] = field(default_factory=count)

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """All slots are free, and what lies in them is not to be trusted."""
        self._free = {slot: CachedPrefix(None, ()) for slot in range(self.size)}
        self._released = dict.fromkeys(range(self.size), -1)

    @property
    def available(self) -> int:
        """How many slots are free."""
        return len(self._free)

    def take(self, adapter: str | None, ids: Sequence[int], in_use: Mapping[int, CachedPrefix]) -> Assignment:
        """Assign a free slot to a conversation.

        The last token of a prompt is always computed, since the answer starts from what comes out of it.

        Args:
            adapter: of the conversation.
            ids: its prompt.
            in_use: what the other conversations have in their slots.
        """
        shared = {slot: each.shared_with(adapter, ids[:-1]) for slot, each in {**in_use, **self._free}.items()}
        source = max(shared, key=shared.__getitem__)
        reused = source in self._free and shared[source] > 0
        slot = source if reused else min(self._free, key=self._released.__getitem__)
        del self._free[slot]
        return Assignment(slot, source, shared[source])

    def release(self, slot: int, content: CachedPrefix) -> None:
        """A conversation has ended; its slot is free and keeps what it has."""
        self._free[slot], self._released[slot] = content, next(self._clock)


def shared_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    size = min(len(one), len(other))
    return next((place for place in range(size) if one[place] != other[place]), size)
