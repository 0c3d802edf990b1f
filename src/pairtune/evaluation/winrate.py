"""How often a tuned model's answer beats its base's, and a rule-based judge that needs no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from pairtune.conversation import Conversation
from pairtune.data.concise import Sample, flaw_of, is_sensible
from pairtune.evaluation.answers import other_language, repeated_share
from pairtune.run.records import Answer, WinRate
from pairtune.statistics import ALPHA, Numbers, share_interval

Progress = Callable[[int], None]

WIN, TIE, LOSS = 1.0, 0.5, 0.0
# What can be wrong with the form of an answer.
FAULTS = ("empty", "cut off", "repeats itself", "in another language")
_REPEATS = 0.3
_RESAMPLES = 500
_NEWTON_STEPS = 25
# Keeps the length coefficient finite where length predicts every win; negligible elsewhere.
_RIDGE = 1e-2


class Judge(Protocol):
    """Decides which of two answers is better."""

    @property
    def name(self) -> str:
        """The judge's name in reports."""

    def judge(
        self, prompts: Sequence[Conversation], ours: Sequence[Answer], base: Sequence[Answer], on_progress: Progress
    ) -> list[float]:
        """One score per prompt: 1 where ours is better, 0 where the base's is, 0.5 for a tie."""


class RuleJudge:
    """Counts faults of form (see `FAULTS`); it does not say which answer is better.

    An answer that was cut off is one that was longer than the token limit, so that this count favours short answers.
    """

    name = "rule (fewer faults: empty, cut off, repeating, another language)"

    def judge(
        self, prompts: Sequence[Conversation], ours: Sequence[Answer], base: Sequence[Answer], on_progress: Progress
    ) -> list[float]:
        return _by_points(lambda prompt, answer: -faults(prompt, answer), prompts, ours, base, on_progress)


class ConciseJudge:
    """The rule behind `bundled:concise` (`data.concise`): sensible answers over others, and others over flawed ones."""

    name = "concise (sensible: complete, direct, 25 to 65 tokens; flawed: rambling, cut off or terse)"

    def judge(
        self, prompts: Sequence[Conversation], ours: Sequence[Answer], base: Sequence[Answer], on_progress: Progress
    ) -> list[float]:
        return _by_points(_conciseness, prompts, ours, base, on_progress)


def _by_points(
    points: Callable[[str, Answer], int],
    prompts: Sequence[Conversation],
    ours: Sequence[Answer],
    base: Sequence[Answer],
    on_progress: Progress,
) -> list[float]:
    """Compare answers by the points that a rule gives to each for the last message."""
    asked = [str(turns[-1]["content"]) for turns in prompts]
    compared = zip(asked, ours, base, strict=True)
    scores = [better(points(prompt, mine), points(prompt, theirs)) for prompt, mine, theirs in compared]
    on_progress(len(scores))
    return scores


def _conciseness(prompt: str, answer: Answer) -> int:
    sample = Sample(answer.text, answer.tokens, answer.ended)
    if is_sensible(prompt, sample):
        return 2
    return 0 if not answer.ended or flaw_of(sample) else 1


def faults_of(prompt: str, answer: Answer) -> tuple[str, ...]:
    """The faults of form that an answer has, of `FAULTS`."""
    if not answer.text:
        return ("empty",)
    found = (not answer.ended, repeated_share(answer.text) > _REPEATS, other_language(prompt, answer.text))
    return tuple(name for name, there in zip(FAULTS[1:], found, strict=True) if there)


def faults(prompt: str, answer: Answer) -> int:
    """How many faults an answer has by the rule."""
    found = faults_of(prompt, answer)
    return len(FAULTS) if "empty" in found else len(found)  # an empty answer is worse than any other


def better(ours: float, theirs: float) -> float:
    """The score of one comparison: the larger value wins."""
    return WIN if ours > theirs else LOSS if ours < theirs else TIE


def win_rate(scores: Sequence[float], ours: Sequence[Answer], base: Sequence[Answer]) -> WinRate:
    """The win rate, ties counting half, with 95% intervals (Wilson; bootstrapped for the length-controlled rate).

    The length-controlled rate is what a logistic regression of the score on the length difference predicts for answers
    of equal length (after Dubois et al. 2024, "Length-Controlled AlpacaEval").
    """
    values = np.array(scores, dtype=np.float64)
    lengths = _length_differences(ours, base)
    generator = np.random.default_rng(0)
    drawn = (generator.integers(0, len(values), len(values)) for _ in range(_RESAMPLES))
    decided = float(np.ptp(values)) == 0  # all scores are equal, so resampling shows no spread
    controlled = [_same_length_rate(values[rows], lengths[rows]) for rows in drawn]
    low, high = np.quantile(controlled, [ALPHA / 2, 1 - ALPHA / 2])
    interval = share_interval(
        float(values.sum()), len(values)
    )  # resampling shows no uncertainty in eight wins of eight
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
    """Tanh of token-count differences over their standard deviation, so that a few very long answers do not decide."""
    differences = np.array([mine.tokens - theirs.tokens for mine, theirs in zip(ours, base, strict=True)], np.float64)
    spread = float(differences.std())
    return np.tanh(differences / spread) if spread else np.zeros_like(differences)


def _same_length_rate(values: Numbers, lengths: Numbers) -> float:
    """Sigmoid of the intercept of a logistic regression, fitted by Newton's method."""
    inputs = np.stack([np.ones_like(lengths), lengths], axis=1)
    weights = np.zeros(2)
    ridge = np.diag([_RIDGE, _RIDGE])
    for _ in range(_NEWTON_STEPS):
        expected = 1 / (1 + np.exp(-inputs @ weights))
        slope = inputs.T @ (values - expected) - ridge @ weights
        curvature = inputs.T @ (inputs * (expected * (1 - expected))[:, None]) + ridge
        weights = weights + np.linalg.solve(curvature, slope)
    return float(1 / (1 + np.exp(-weights[0])))
