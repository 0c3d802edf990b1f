"""regressions.json: held-out pairs on which tuning hurt."""

from __future__ import annotations

from pairtune.conversation import Message
from pairtune.run.records.base import Part, Record


class RegressedPair(Part):
    """A held-out pair on which the tuned model moved towards the rejected answer: its reward margin is negative."""

    origin: str
    margin: float
    prompt: list[Message]
    chosen: str
    rejected: str


class Regressions(Record):
    """The held-out pairs on which tuning hurt most, with their texts.

    Attributes:
        split: the split that they are from: test, or validation if there is no test split.
        pairs: those with the lowest reward margins, the lowest first; at most a few.
        count: number of pairs with a negative margin.
        of: number of pairs of the split.
    """

    file = "regressions.json"

    split: str
    pairs: list[RegressedPair]
    count: int
    of: int
