"""What `pairtune compare` finds about two models."""

from __future__ import annotations

from typing import Literal

from pairtune.run.records.base import Interval, Part
from pairtune.run.records.data_record import SourceAccount

Outcome = Literal["better", "worse", "cannot be told"]


class Difference(Part):
    """One metric of both models, and the difference, the second minus the first.

    Attributes:
        one, other: means over pairs.
        interval: 95 % of the difference, by conversations.
        p: of the paired sign-flip test over conversations.
    """

    one: float
    other: float
    difference: float
    interval: Interval
    p: float


class ComparedModels(Part):
    """The second model against the first.

    Attributes:
        one, other: as the user named them.
        outcome: whether the second is better; by the loss.
        base: the model that both are measured against.
        beta: of the loss.
        data: how many rows the pairs came from.
        pairs: number of pairs, in `conversations` groups of related prompts.
        loss: DPO's, -log sigmoid(beta * margin).
        accuracy: the share of pairs whose chosen answer gains more over the base than the rejected one.
        needed: about how many pairs would tell them apart; None if they are, or if no number would.
    """

    one: str
    other: str
    outcome: Outcome
    base: str
    beta: float
    data: SourceAccount
    pairs: int
    conversations: int
    loss: Difference
    accuracy: Difference
    needed: int | None = None
