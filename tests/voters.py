"""Simulated voters with a known preference, a liking for the left and for longer answers, and noise."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from itertools import permutations

from pairtune.votes.records import Vote, VotedAnswer
from pairtune.votes.standings import TWICE, chances

TIE = -1.0  # log of the weight of ties


@dataclass
class Voters:
    """A group of people who prefer models by their strengths.

    Attributes:
        strengths: of the models, in nats.
        side: share of votes that go to the left whatever the answers are.
        length: what an answer gains with its relative length, in nats.
        noise: share of votes given by lot.
        people: how many there are.
    """

    strengths: dict[str, float]
    side: float = 0.1
    length: float = 1.0
    noise: float = 0.2
    people: int = 25
    draw: random.Random = field(default_factory=random.Random)
    given: int = 0

    def vote(self, left: str, right: str) -> Vote:
        """One person's vote on two answers of random lengths."""
        tokens = [max(5, round(math.exp(self.draw.gauss(4, 0.5)))) for _ in range(2)]
        self.given += 1
        return Vote(
            id=self.given,
            kind="arena",
            outcome=self._outcome(left, right, (tokens[0] - tokens[1]) / sum(tokens)),
            prompt=[{"role": "user", "content": f"Question {self.given}"}],
            answers=[
                VotedAnswer(model=model, text=f"{model} {self.given}", tokens=count)
                for model, count in zip((left, right), tokens, strict=True)
            ],
            voter=str(self.draw.randrange(self.people)),
            created="2026-01-01T00:00:00",
        )

    def _outcome(self, left: str, right: str, longer: float) -> str:
        chance = self.draw.random()
        if chance < self.noise:
            return self.draw.choice(["left", "tie", "right"])
        if chance < self.noise + self.side:
            return "left"
        ahead = self.strengths[left] - self.strengths[right] + self.length * longer
        return self.draw.choices(["left", "tie", "right"], chances(ahead, TIE))[0]

    @property
    def side_effect(self) -> float:
        """How much more often these people choose left than right between equally good and long answers."""
        return self.side

    @property
    def length_effect(self) -> float:
        """How much more often they choose an answer twice as long than the other one, in the mean over all matches."""
        leads = []
        for left, right in permutations(self.strengths.values(), 2):
            for sign in (1, -1):
                chosen, _, other = chances(left - right + sign * self.length * TWICE, TIE)
                leads.append(sign * (chosen - other))
        return (1 - self.noise - self.side) * sum(leads) / len(leads)
