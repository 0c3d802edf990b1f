"""What `pairtune data inspect` and `pairtune plan` find, as records; light, since reports load no tokenizer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pairtune.cost import Cost, Speed
from pairtune.footprint import ModelShape, PairLengths
from pairtune.run.records import DecodedPair, Interval, Level, Part

# Tokens of an answer with its end token, and the ratio of two answers' lengths, from which a pair is odd.
_ALMOST_EMPTY, _MUCH_LONGER = 3, 4

Verdict = Literal["ok", "ok with warnings", "not confirmed", "not usable"]


class DroppedRows(Part):
    """Rows that were dropped for one reason.

    Attributes:
        rows: number of rows.
        stops: whether training would stop at the first of them.
        places: file, row and fault of the first few.
    """

    rows: int
    stops: bool
    places: list[str]


class LengthSummary(Part):
    """Token counts, summarized; `histogram` has a bin up to each of `Inspection.lengths_up_to`, and one above them."""

    mean: float
    median: float
    p95: float
    max: int
    histogram: list[int]


class LongerWins(Part):
    """How well "the longer answer is the better one" predicts the labels; equal lengths count half."""

    accuracy: float
    interval: Interval
    same_length: int


class PromptCounts(Part):
    """The numbers of distinct prompts and of groups of related prompts."""

    different: int
    unrelated: int


class SpecialTokens(Part):
    """Pairs whose texts contain the model's special tokens, and the origins of the first few."""

    pairs: int
    places: list[str]


def odd_lengths(chosen: int, rejected: int) -> list[str]:
    """What is odd about the token counts of a pair's answers, in words; the template's tokens count."""
    shorter, longer = sorted((chosen, rejected))
    found = []
    if shorter <= _ALMOST_EMPTY:
        found.append("an answer is almost empty")
    if longer > _MUCH_LONGER * max(1, shorter):
        found.append(f"one answer is more than {_MUCH_LONGER} times as long")
    return found


class DataFinding(Part):
    """Something that the user should know before training."""

    level: Level
    message: str


class Inspection(Part):
    """The result for one source.

    Attributes:
        source: as the user typed it.
        format: its format; None if no row could be read.
        better: which answer is taken for the better one, and why.
        single: numbers of desirable and undesirable answers, if the rows are single answers instead of pairs.
        max_length: the limit in tokens.
        rows_in: number of rows read.
        further: number of pairs after the first of rows that give several.
        kept: number of pairs; with all of `dropped` it equals `rows_in` plus `further`.
        dropped: the other rows, by reason.
        unused: number of rows with something in a field that is not read, by field.
        notes: other counts of rows that were kept.
        lengths: token counts by part; None if there are no pairs.
        longest: tokens of the longest pair as it would be used, its prompt and both answers.
        lengths_up_to: upper bounds of the histograms' bins.
        longer_wins: how well length predicts the labels.
        shortened: pairs whose prompt lost its oldest turns.
        prompts: how many prompts there are, and how many unrelated ones.
        duplicates: pairs that repeat another one.
        conflicts: pairs whose answers another pair has the other way round.
        special_tokens: pairs with the model's special tokens in their texts.
        odd_pairs: pairs with `odd_lengths`.
        examples: the first pairs, as the model sees them.
        template_warnings: what the user should know about the tokenizer and its template.
        findings: what the user should know.
        verdict: whether the source can be trained on.
    """

    source: str
    format: str | None
    better: str
    max_length: int
    rows_in: int
    further: int
    kept: int
    dropped: dict[str, DroppedRows]
    unused: dict[str, int]
    notes: dict[str, int]
    lengths: dict[str, LengthSummary | None]
    longest: int
    lengths_up_to: tuple[int, ...]
    longer_wins: LongerWins | None
    shortened: int
    prompts: PromptCounts
    duplicates: int
    conflicts: int
    special_tokens: SpecialTokens
    single: tuple[int, int] | None = None
    odd_pairs: dict[str, int] = Field(default_factory=dict)
    examples: list[DecodedPair]
    template_warnings: list[str]
    findings: list[DataFinding] = Field(default_factory=list)
    verdict: Verdict = "ok"

    @property
    def noun(self) -> str:
        """What the rows give."""
        return "answer" if self.single else "pair"

    @property
    def example(self) -> DecodedPair | None:
        """The first pair, as the model sees it."""
        return self.examples[0] if self.examples else None


class Plan(Part):
    """What is known about a run before it starts.

    Attributes:
        inspections: the findings for each training source.
        pairs: the number of pairs by split, about; splits are drawn when the run starts.
        lengths: what the pairs are like; None if there are none.
        shape: the model.
        speed: this machine; None if there are no pairs.
        cost: time and memory; None if there are no pairs.
        notes: what was supposed where something is not known.
    """

    inspections: list[Inspection]
    pairs: dict[str, int]
    lengths: PairLengths | None
    shape: ModelShape
    speed: Speed | None
    cost: Cost | None
    notes: tuple[str, ...] = ()
