"""From tokens to text that can be shown at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class IncrementalDetokenizer:
    """Tokens in, text out that no later token changes.

    A character of several tokens is held back until it is whole, and so is what may become a stop text.
    """

    tokenizer: Any
    stop: Sequence[str] = ()
    stopped: bool = False
    _ids: list[int] = field(default_factory=list)
    _start: int = 0  # decoding begins here, since a token's text may depend on the one before it
    _shown: int = 0  # tokens whose text has been taken
    _held: str = ""

    def push(self, token: int) -> str:
        """Text that is certain now; `stopped` says that a stop text was found."""
        self._ids.append(token)
        before = self._decode(self._start, self._shown)
        text = self._decode(self._start, len(self._ids))
        if len(text) <= len(before) or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return self._until_stop(text[len(before) :])

    def flush(self) -> str:
        """What was held back, at the end of the answer."""
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
        places = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        if places:
            self.stopped = True
            return text[: min(places)]
        kept = max((_overlap(text, stop) for stop in self.stop), default=0)
        if kept:
            text, self._held = text[:-kept], text[-kept:]
        return text


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters may be the beginning of the stop text."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)
