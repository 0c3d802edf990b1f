"""generations.json and choosing.json: generated answers, and how they compare with the base's."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from pairtune.conversation import Message
from pairtune.run.records.base import Interval, Part, Record
from pairtune.run.records.data_record import SourceAccount
from pairtune.run.records.selection_records import ExampleSummary, Measured


class Answer(Part):
    """One generated answer.

    Attributes:
        text: the decoded answer, without special tokens and surrounding whitespace.
        tokens: number of generated tokens, without the end token.
        ended: whether the model ended it by itself; False if it was cut off at the token limit.
    """

    text: str
    tokens: int
    ended: bool


class AnswerSummary(Part):
    """Statistics of a set of answers.

    Attributes:
        median_tokens: median length.
        ended_share: share of answers that ended by themselves within the token limit.
        empty_share: share of answers without a word.
        repeated_share: mean share of an answer's phrases that it has used before.
        distinct_1: distinct words over all words of all answers together (distinct-n, Li et al. 2016).
        distinct_2: the same for pairs of words.
        refused_share: share of answers that begin like refusals.
        other_language_share: share of answers in a different language than the prompt.
    """

    median_tokens: float
    ended_share: float
    empty_share: float
    repeated_share: float
    distinct_1: float = 0.0
    distinct_2: float = 0.0
    refused_share: float = 0.0
    other_language_share: float = 0.0


class WinRate(Part):
    """The share of wins against the base, with ties counted half.

    Attributes:
        rate: the win rate, with its `interval`.
        length_controlled: the estimated rate if both answers had the same length, with its interval.
        scores: 1, 0.5 or 0 for each prompt; empty if not recorded.
    """

    rate: float
    interval: Interval
    wins: int
    ties: int
    losses: int
    length_controlled: float
    length_controlled_interval: Interval
    scores: list[float] = []


class ModelAnswers(Part):
    """One model's answers, prompt by prompt; the base has no win rate."""

    summary: AnswerSummary
    answers: list[Answer]
    win_rate: WinRate | None = None


class Decoding(Part):
    """How answers were sampled."""

    max_new_tokens: int
    temperature: float
    top_k: int = 0
    seed: int = 0


class AnswersRecord(Record):
    """Held-out prompts with the answers of the base (`base`) and of tuned models, by trial."""

    sampling: Decoding
    prompts: list[list[Message]]
    models: dict[str, ModelAnswers]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if "base" not in self.models:
            raise ValueError("the base's answers are missing")
        if any(len(each.answers) != len(self.prompts) for each in self.models.values()):
            raise ValueError("a model has not answered every prompt")
        return self


class Generations(AnswersRecord):
    """Answers before and after tuning, to prompts that were not used in it."""

    file = "generations.json"


class Choosing(AnswersRecord):
    """Answers to validation prompts, by which the rule `fewer_faults` selects."""

    file = "choosing.json"


class JudgedAnswers(Part):
    """Held-out prompts answered by a model and its base, and the win rate according to a judge."""

    prompts: int
    base: AnswerSummary
    tuned: AnswerSummary
    judge: str
    win_rate: WinRate


class EvaluationReport(Measured):
    """The result of `pairtune eval`: what a model prefers, and what it answers."""

    model: str
    base: str
    data: SourceAccount
    pairs: int
    examples: ExampleSummary
    answers: JudgedAnswers | None = None
