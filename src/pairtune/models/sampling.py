"""How tokens are sampled: the same parameters for evaluations, the terminal chat and the server."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Below this, dividing by the temperature overflows.
_GREEDY_BELOW = 1e-5


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one answer are sampled.

    The default is top-k, not top-p: top-p sorts the whole vocabulary at every token, which took a fifth of the
    generation time with a small model on a CPU.

    Attributes:
        max_tokens: the length at which the answer is cut off.
        temperature: 0 is greedy.
        top_p: among the `top_k` tokens, only the most likely ones with this total probability are sampled.
        top_k: only this many of the most likely tokens are sampled.
        stop: strings that end an answer; they are not part of it.
        seed: the random seed; None for a new one each time.
    """

    max_tokens: int = 160
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 50
    stop: tuple[str, ...] = ()
    seed: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < _GREEDY_BELOW

    def generator(self) -> torch.Generator:
        """The random generator for one answer."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator

    def sample(self, logits: Tensor, generator: torch.Generator) -> int:
        """Sample a token from logits over the vocabulary, [V]."""
        if self.greedy:
            return int(logits.argmax())
        likely, tokens = logits.float().cpu().topk(min(self.top_k, len(logits)))  # sorted, the most likely first
        probabilities = (likely / self.temperature).softmax(0)
        if self.top_p < 1:
            kept = probabilities.cumsum(0) - probabilities < self.top_p
            kept[0] = True
            probabilities = probabilities * kept
        return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])
