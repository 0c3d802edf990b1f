"""data.json: the account of every row that was read."""

from __future__ import annotations

from pairtune.run.records.base import Part, Record


class SourceAccount(Part):
    """The row count of one source and split; `rows_in` plus `further` always equals `kept` plus all of `dropped`.

    `further` counts the pairs after the first of rows that give several, `shortened` kept pairs whose prompt lost its
    oldest turns.
    """

    source: str
    split: str
    rows_in: int
    further: int = 0
    kept: int
    dropped: dict[str, int]
    shortened: int = 0


class SplitRecord(Part):
    """The number of pairs in a split, and a fingerprint of their content."""

    pairs: int
    fingerprint: str


class DecodedPair(Part):
    """A pair as the model sees it, including special tokens; only the answers contribute to the loss."""

    origin: str
    prompt: str
    chosen: str
    rejected: str


class DataRecord(Record):
    """The counts of all rows read, and the content of the splits.

    Attributes:
        sources: the counts by source and split.
        formats: each source's format.
        better: what says in each source which answer is the better one.
        unused: fields of each source that were not used, with the number of rows that have them.
        notes: other things counted of each source's rows, such as annotators who disagree.
        splits: the pairs of each split.
        max_length: the limit in tokens that applied.
        split_seed: the seed that splits were drawn with.
        template_warnings: what the user should know about the tokenizer and its template.
        example: the first pair, as the model sees it.
    """

    file = "data.json"

    sources: list[SourceAccount]
    formats: dict[str, str | None] = {}
    better: dict[str, str] = {}
    unused: dict[str, dict[str, int]] = {}
    notes: dict[str, dict[str, int]] = {}
    splits: dict[str, SplitRecord]
    max_length: int | None = None
    split_seed: int = 0
    template_warnings: list[str] = []
    example: DecodedPair | None = None
