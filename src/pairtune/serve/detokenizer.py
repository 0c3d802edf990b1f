"""Incremental detokenization for streaming."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class IncrementalDetokenizer:
    """Turns tokens into text that no later token changes.

    Incomplete UTF-8 characters are held back, and so is text that may be the beginning of a stop string.
    """

    tokenizer: Any
    stop: Sequence[str] = ()
    stopped: bool = False
    _ids: list[int] = field(default_factory=list)
    _start: int = 0  # decoding starts here, since a token's text may depend on the previous one
    _shown: int = 0  # tokens whose text has been returned
    _held: str = ""

    def push(self, token: int) -> str:
        """Add a token and return the text that is now final; `stopped` is set when a stop string was found."""
        self._ids.append(token)
        before = self._decode(self._start, self._shown)
        text = self._decode(self._start, len(self._ids))
        if len(text) <= len(before) or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return self._until_stop(text[len(before) :])

    def flush(self) -> str:
        """Return the text still held back, at the end of the answer."""
        text = self._decode(self._start, len(self._ids))[len(self._decode(self._start, self._shown)) :]
        self._shown = len(self._ids)
        rest = self._until_stop(text)
        rest, self._held = (rest if self.stopped else rest + self._held), ""
        return rest

    def _decode(self, start: int, end: int) -> str:
        text: str = self.tokenizer.decode(self._ids[start:end], skip_special_tokens=True)
        return text

    def _until_stop(self, text: str) -> str:
        text = self._held + text
        self._held = ""
        found = [start for stop in self.stop if (start := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        kept = max((_overlap(text, stop) for stop in self.stop), default=0)
        if kept:
            text, self._held = text[:-kept], text[-kept:]
        return text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest suffix of the text that begins the stop string."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)
