"""What `pairtune data inspect` finds, as records: light enough for reports, which load no tokenizer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pairtune.run.records import DecodedPair, Interval, Level, Part

Verdict = Literal["ok", "ok with warnings", "not usable"]


class DroppedRows(Part):
    """Rows that became no pair for one reason.

    Attributes:
        rows: how many.
        stops: whether training would stop at the first of them.
        places: of the first ones, with what is wrong there.
    """

    rows: int
    stops: bool
    places: list[str]


class LengthSummary(Part):
    """Of token counts; `histogram` counts those up to each of `Inspection.lengths_up_to`, and last those above."""

    mean: float
    median: float
    p95: float
    max: int
    histogram: list[int]


class LongerWins(Part):
    """How well "the longer answer is the better one" predicts the labels; answers of one length count half."""

    accuracy: float
    interval: Interval
    same_length: int


class PromptCounts(Part):
    """Prompts that differ, and groups of prompts that have nothing to do with one another."""

    different: int
    unrelated: int


class SpecialTokens(Part):
    """Pairs whose texts hold the model's special tokens, and the first places."""

    pairs: int
    places: list[str]


class DataFinding(Part):
    """Something that a person should know before training."""

    level: Level
    message: str


class Inspection(Part):
    """A source, examined; `lengths` is by part, and None where there is no pair."""

    source: str
    format: str | None
    max_length: int
    rows_in: int
    kept: int
    dropped: dict[str, DroppedRows]
    lengths: dict[str, LengthSummary | None]
    lengths_up_to: tuple[int, ...]
    longer_wins: LongerWins | None
    shortened: int
    prompts: PromptCounts
    duplicates: int
    conflicts: int
    special_tokens: SpecialTokens
    example: DecodedPair | None
    template_warnings: list[str]
    findings: list[DataFinding] = Field(default_factory=list)
    verdict: Verdict = "ok"
