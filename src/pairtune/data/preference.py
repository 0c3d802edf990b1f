"""The preference pair that every data format is converted to, and the count of rows kept and dropped."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from pairtune.conversation import Message
from pairtune.run.records import SourceAccount


class BadRow(Exception):
    """A row that cannot become a pair.

    Attributes:
        reason: a short name shared by all rows with this fault; `data.json` counts rows by it.
        field: the faulty field; empty if the fault is in the row as a whole.
    """

    def __init__(self, reason: str, field: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.field = field


class LeftOut(BadRow):
    """A valid row that gives no pair, such as a tie: it is counted and left out, and never stops a run."""


@dataclass(frozen=True)
class PreferencePair:
    """One human (or rule-made) preference.

    Attributes:
        prompt: the conversation up to the answer; ends with a user turn.
        chosen: the preferred answer's text.
        rejected: the other answer's text.
        origin: `file:row`, with rows counted from 1.
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    origin: str

    def conversational(self) -> dict[str, Any]:
        """The pair in TRL's conversational preference format."""
        return {
            "prompt": list(self.prompt),
            "chosen": [{"role": "assistant", "content": self.chosen}],
            "rejected": [{"role": "assistant", "content": self.rejected}],
        }


@dataclass
class RowCount:
    """The row count of one source and split; `rows_in` always equals `kept` plus all of `dropped`.

    `shortened` counts kept pairs whose prompt lost its oldest turns.
    """

    source: str
    split: str
    rows_in: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    shortened: int = 0

    def drop(self, reason: str) -> None:
        """Count one row as read and dropped."""
        self.rows_in += 1
        self.dropped[reason] += 1

    def keep(self, shortened: bool) -> None:
        """Count one row as read and kept."""
        self.rows_in += 1
        self.kept += 1
        self.shortened += shortened

    def account(self) -> SourceAccount:
        """The counts as a record for `data.json`.

        Raises:
            AssertionError: the counts do not add up, which is a bug in the program, not a fault of the data.
        """
        if self.rows_in != self.kept + self.dropped.total():
            raise AssertionError(
                f"{self.source}: {self.rows_in} rows in, {self.kept} kept, {dict(self.dropped)} dropped"
            )
        return SourceAccount(
            source=self.source,
            split=self.split,
            rows_in=self.rows_in,
            kept=self.kept,
            dropped=dict(self.dropped),
            shortened=self.shortened,
        )
