"""How often a tuned model's answer is better than its base's, and the judge that needs no model for it: a rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from pairtune.conversation import Conversation
from pairtune.evaluate.answers import other_language, repeated_share
from pairtune.run.records import Answer, WinRate
from pairtune.statistics import ALPHA, Numbers, share_interval

Progress = Callable[[int], None]

WIN, TIE, LOSS = 1.0, 0.5, 0.0
_REPEATS = 0.3
_RESAMPLES = 500
_NEWTON_STEPS = 25
# Keeps the slope of lengths finite where they predict every win; next to nothing where they do not.
_RIDGE = 1e-2


class Judge(Protocol):
    """Says which of two answers is better."""

    @property
    def name(self) -> str:
        """For reports."""

    def judge(
        self, prompts: Sequence[Conversation], ours: Sequence[Answer], base: Sequence[Answer], on_progress: Progress
    ) -> list[float]:
        """1 where ours is better, 0 where the base's is, a half for a tie; one number a prompt."""


class RuleJudge:
    """Counts faults that need no taste: no words, no end within the limit, the same phrases again, another language.

    The answer with fewer faults wins; equally many are a tie.
    """

    name = "rule (fewer faults: empty, cut off, repeating, another language)"

    def judge(
        self, prompts: Sequence[Conversation], ours: Sequence[Answer], base: Sequence[Answer], on_progress: Progress
    ) -> list[float]:
        scores = []
        for turns, mine, theirs in zip(prompts, ours, base, strict=True):
            prompt = str(turns[-1]["content"])
            scores.append(better(-faults(prompt, mine), -faults(prompt, theirs)))
        on_progress(len(scores))
        return scores


def faults(prompt: str, answer: Answer) -> int:
    """How many of the rule's faults an answer has."""
    if not answer.text:
        return 4  # worse than any that says something
    return (not answer.ended) + (repeated_share(answer.text) > _REPEATS) + other_language(prompt, answer.text)


def better(ours: float, theirs: float) -> float:
    """The larger one wins."""
    return WIN if ours > theirs else LOSS if ours < theirs else TIE


def win_rate(scores: Sequence[float], ours: Sequence[Answer], base: Sequence[Answer]) -> WinRate:
    """The share of wins, ties counted half, with 95 % intervals (Wilson's; of the second rate bootstrapped).

    The length-controlled rate is that which is left when both answers have the same length, from a logistic regression
    of the score on the difference of lengths (after Dubois et al. 2024, "Length-Controlled AlpacaEval").
    """
    values = np.array(scores, dtype=np.float64)
    lengths = _length_differences(ours, base)
    generator = np.random.default_rng(0)
    drawn = (generator.integers(0, len(values), len(values)) for _ in range(_RESAMPLES))
    decided = float(np.ptp(values)) == 0  # all scores are the same, so that resampling shows nothing
    controlled = [_same_length_rate(values[rows], lengths[rows]) for rows in drawn]
    low, high = np.quantile(controlled, [ALPHA / 2, 1 - ALPHA / 2])
    interval = share_interval(float(values.sum()), len(values))  # resampling sees no doubt in eight wins of eight
    return WinRate(
        rate=float(values.mean()),
        interval=interval,
        wins=int((values == WIN).sum()),
        ties=int((values == TIE).sum()),
        losses=int((values == LOSS).sum()),
        length_controlled=_same_length_rate(values, lengths),
        length_controlled_interval=(
            min(float(low), interval[0]) if decided else float(low),
            max(float(high), interval[1]) if decided else float(high),
        ),
        scores=list(scores),
    )


def _length_differences(ours: Sequence[Answer], base: Sequence[Answer]) -> Numbers:
    """Tanh of the differences in tokens over their standard deviation, so that few very long answers do not decide."""
    differences = np.array([mine.tokens - theirs.tokens for mine, theirs in zip(ours, base, strict=True)], np.float64)
    spread = float(differences.std())
    return np.tanh(differences / spread) if spread else np.zeros_like(differences)


def _same_length_rate(values: Numbers, lengths: Numbers) -> float:
    """Sigmoid of the intercept of a logistic regression, by Newton's method."""
    inputs = np.stack([np.ones_like(lengths), lengths], axis=1)
    weights = np.zeros(2)
    ridge = np.diag([_RIDGE, _RIDGE])
    for _ in range(_NEWTON_STEPS):
        expected = 1 / (1 + np.exp(-inputs @ weights))
        slope = inputs.T @ (values - expected) - ridge @ weights
        curvature = inputs.T @ (inputs * (expected * (1 - expected))[:, None]) + ridge
        weights = weights + np.linalg.solve(curvature, slope)
    return float(1 / (1 + np.exp(-weights[0])))
