"""One vote with everything that is needed to trust it, as the site keeps it and `pairtune votes export` writes it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from pairtune.conversation import Message
from pairtune.run.records import Part

# How two answers were compared, or that one answer got a thumb.
Kind = Literal["arena", "side by side", "regenerated", "thumb"]
# Of two answers, the left one is the first; `bad` means that neither is good.
Outcome = Literal["left", "right", "tie", "bad", "up", "down"]


class VotedAnswer(Part):
    """An answer as the voter saw it.

    Attributes:
        model: the name of the model.
        fingerprint: fingerprints of its weights, the base's and the adapter's, as the model server reported them.
        text: the answer.
        tokens: its length.
        finish: `stop`, or `length` if it was cut off.
        sampling: temperature, top_p, max_tokens and seed, where set.
        context: the conversation before it, where it differs from the other answer's.
    """

    model: str
    fingerprint: str = ""
    text: str
    tokens: int = 0
    finish: str = ""
    sampling: dict[str, Any] = Field(default={})
    context: list[Message] = Field(default=[])

    @property
    def weights(self) -> str:
        """What answered: the fingerprint, or the name where the server reports none. Names can be given twice."""
        return self.fingerprint or self.model


class Vote(Part):
    """A vote.

    Attributes:
        id: its number in the site's database.
        kind: how it was given.
        outcome: what was chosen.
        prompt: the conversation up to the answers.
        answers: the left and the right one, or the one that got a thumb.
        reason: in the voter's words.
        voter: the anonymous session that it was given in.
        created: when, as ISO 8601.
        withdrawn: when it was withdrawn; None while it stands.
    """

    id: int
    kind: Kind
    outcome: Outcome
    prompt: list[Message]
    answers: list[VotedAnswer]
    reason: str = ""
    voter: str
    created: str
    withdrawn: str | None = None

    @property
    def compares(self) -> bool:
        """Whether it compares two answers of different models."""
        return len(self.answers) == 2 and self.answers[0].weights != self.answers[1].weights
