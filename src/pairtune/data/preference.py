"""The preference pair that every data format is converted to, and the count of rows kept and dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pairtune.conversation import Message
from pairtune.run.records import SourceAccount

Answer = Literal["chosen", "rejected"]
ANSWERS: tuple[Answer, Answer] = ("chosen", "rejected")


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
    """One human (or rule-made) preference: between two answers, or for unpaired losses about a single one.

    Attributes:
        prompt: the conversation up to the answer; ends with a user turn, or with a tool's result.
        chosen: the preferred answer's text, or a single desirable answer.
        rejected: the other answer's text, or a single undesirable answer; of a single answer the other one is empty.
        origin: `file:row`, with rows counted from 1; of a row's further pairs, `file:row.2` and so on.
        thinking: the reasoning before the chosen and the rejected answer; empty where there is none.
        tools: the tools that the prompt offers, as JSON schemas.
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    origin: str
    thinking: tuple[str, str] = ("", "")
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def single(self) -> bool:
        """Whether this is a single answer."""
        return not (self.chosen and self.rejected)

    def halves(self) -> tuple[PreferencePair, ...]:
        """The two answers as single ones, the desirable one first; a single answer is its only half."""
        if self.single:
            return (self,)
        good, bad = self.thinking
        return replace(self, rejected="", thinking=(good, "")), replace(self, chosen="", thinking=("", bad))

    def given(self, side: Answer) -> Answer:
        """The side itself, or the other one if it has no answer."""
        if side == "chosen":
            return "chosen" if self.chosen else "rejected"
        return "rejected" if self.rejected else "chosen"

    def answer(self, side: Answer) -> Message:
        """One of the two answers as a turn."""
        text, thinking = (self.chosen, self.thinking[0]) if side == "chosen" else (self.rejected, self.thinking[1])
        return answer_turn(text, thinking)

    def conversational(self) -> dict[str, Any]:
        """The pair in TRL's conversational preference format, or a single answer in its unpaired format."""
        tools = {"tools": list(self.tools)} if self.tools else {}
        if self.single:
            answer = self.answer(self.given("chosen"))
            return {"prompt": list(self.prompt), "completion": [answer], "label": bool(self.chosen), **tools}
        return {
            "prompt": list(self.prompt),
            "chosen": [self.answer("chosen")],
            "rejected": [self.answer("rejected")],
            **tools,
        }


def answer_turn(text: str, thinking: str = "") -> Message:
    """An assistant's turn; `reasoning_content` is where chat templates look for reasoning (Qwen3's, for example)."""
    turn: Message = {"role": "assistant", "content": text}
    return {**turn, "reasoning_content": thinking} if thinking else turn


@dataclass
class RowCount:
    """The row count of one source and split; `rows_in` plus `further` always equals `kept` plus all of `dropped`.

    A row with more than two answers may give several pairs: `further` counts those after its first. `shortened` counts
    kept pairs whose prompt lost its oldest turns.
    """

    source: str
    split: str
    rows_in: int = 0
    further: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    shortened: int = 0

    def drop(self, reason: str, *, further: bool = False) -> None:
        """Count one row (or a further pair of a row) as read and dropped."""
        self._read(further)
        self.dropped[reason] += 1

    def keep(self, shortened: bool, *, further: bool = False) -> None:
        """Count one row (or a further pair of a row) as read and kept."""
        self._read(further)
        self.kept += 1
        self.shortened += shortened

    def _read(self, further: bool) -> None:
        self.rows_in += not further
        self.further += further

    def account(self) -> SourceAccount:
        """The counts as a record for `data.json`.

        Raises:
            AssertionError: the counts do not add up, which is a bug in the program, not a fault of the data.
        """
        if self.rows_in + self.further != self.kept + self.dropped.total():
            raise AssertionError(
                f"{self.source}: {self.rows_in} rows in and {self.further} further pairs, {self.kept} kept, "
                f"{dict(self.dropped)} dropped"
            )
        return SourceAccount(
            source=self.source,
            split=self.split,
            rows_in=self.rows_in,
            further=self.further,
            kept=self.kept,
            dropped=dict(self.dropped),
            shortened=self.shortened,
        )
