"""data.json: the account of every row that was read."""

from __future__ import annotations

from pairtune.run.records.base import Part, Record


class SourceAccount(Part):
    """The row count of one source and split; `rows_in` always equals `kept` plus all of `dropped`.

    `shortened` counts kept pairs whose prompt lost its oldest turns.
    """

    source: str
    split: str
    rows_in: int
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
    """The counts of all rows read, and the content of the splits."""

    file = "data.json"

    sources: list[SourceAccount]
    formats: dict[str, str | None] = {}
    splits: dict[str, SplitRecord]
    max_length: int | None = None
    split_seed: int = 0
    template_warnings: list[str] = []
    example: DecodedPair | None = None
