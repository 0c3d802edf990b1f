"""From logits to tokens, and from tokens to text that can be shown at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Drawing:
    """How the tokens of one answer are drawn.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: the likeliest tokens with this probability together are drawn from, of the `top_k` likeliest.
        top_k: at most so many tokens are drawn from.
        max_tokens: after which the answer is cut off.
        stop: texts that end an answer; they are not part of it.
        seed: of the draws; None: another one each time.
    """

    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 50
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def generator(self) -> torch.Generator:
        """The source of this answer's draws."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator

    def draw(self, logits: Tensor, generator: torch.Generator) -> int:
        """A token, from logits over the vocabulary, [V]."""
        if self.temperature < 1e-5:  # below that, quotients overflow
            return int(logits.argmax())
        likely, tokens = logits.float().cpu().topk(min(self.top_k, len(logits)))  # sorted, the likeliest first
        shares = (likely / self.temperature).softmax(0)
        if self.top_p < 1:
            left = shares.cumsum(0) - shares < self.top_p
            left[0] = True
            shares = shares * left
        return int(tokens[torch.multinomial(shares, 1, generator=generator)])


@dataclass
class TextStream:
    """Tokens in, text out that no later token changes.

    A character of several tokens is held back until it is whole, and so is what may become a stop text.
    """

    tokenizer: Any
    stop: Sequence[str] = ()
    stopped: bool = False
    _ids: list[int] = field(default_factory=list)
    _from: int = 0  # decoding begins here, since a token's text may depend on the one before it
    _shown: int = 0  # tokens whose text has been taken
    _held: str = ""

    def push(self, token: int) -> str:
        """Text that is certain now; `stopped` says that a stop text was found."""
        self._ids.append(token)
        before = self._decode(self._from, self._shown)
        text = self._decode(self._from, len(self._ids))
        if len(text) <= len(before) or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._from, self._shown = self._shown, len(self._ids)
        return self._until_stop(text[len(before) :])

    def flush(self) -> str:
        """What was held back, at the end of the answer."""
        text = self._decode(self._from, len(self._ids))[len(self._decode(self._from, self._shown)) :]
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
