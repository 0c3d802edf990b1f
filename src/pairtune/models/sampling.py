"""How tokens are sampled: the same parameters for checks of answers, the terminal chat and the server."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Below this, quotients by the temperature overflow.
_GREEDY_BELOW = 1e-5


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one answer are sampled.

    By default by rank (top-k), not by probability mass (top-p): top-p sorts the whole vocabulary at every token, which
    took a fifth of the time of generating with a small model on a CPU.

    Attributes:
        max_tokens: after which the answer is cut off.
        temperature: 0 is greedy.
        top_p: the likeliest tokens with this probability together are sampled from, of the `top_k` likeliest.
        top_k: at most so many tokens are sampled from.
        stop: texts that end an answer; they are not part of it.
        seed: of the draws; None: another one each time.
    """

    max_tokens: int = 160
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 50
    stop: tuple[str, ...] = ()
    seed: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < _GREEDY_BELOW

    def generator(self) -> torch.Generator:
        """The source of an answer's draws."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator

    def sample(self, logits: Tensor, generator: torch.Generator) -> int:
        """A token, from logits over the vocabulary, [V]."""
        if self.greedy:
            return int(logits.argmax())
        likely, tokens = logits.float().cpu().topk(min(self.top_k, len(logits)))  # sorted, the likeliest first
        probabilities = (likely / self.temperature).softmax(0)
        if self.top_p < 1:
            kept = probabilities.cumsum(0) - probabilities < self.top_p
            kept[0] = True
            probabilities = probabilities * kept
        return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])
