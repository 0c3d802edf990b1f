"""What a rule is, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pairtune.evaluate.audit.evidence import Evidence

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Hit:
    """One thing that a rule has found.

    Attributes:
        level: `error`: what is reported is wrong; `warning`: it does not mean what it seems to; `note`: worth knowing.
        trials: the names of those concerned; empty: the work as a whole.
        evidence: the numbers, in one sentence.
    """

    level: Level
    trials: tuple[str, ...]
    evidence: str


@dataclass(frozen=True)
class Rule:
    """One thing that can be wrong.

    Attributes:
        id: a short name that stays the same.
        title: what it is, in a few words.
        explanation: why it matters, for someone who never met it.
        advice: what to do.
        needs: says what is missing of the evidence, so that the rule could not look; empty: nothing.
        check: looks.
        live: whether it is asked while trials run.
    """

    id: str
    title: str
    explanation: str
    advice: str
    check: Callable[[Evidence], Iterator[Hit]]
    needs: Callable[[Evidence], str]
    live: bool = False


@dataclass(frozen=True)
class Finding:
    """A hit with what its rule has to say about it."""

    rule: str
    level: Level
    title: str
    trials: tuple[str, ...]
    evidence: str
    explanation: str
    advice: str

    @classmethod
    def of(cls, rule: Rule, hit: Hit) -> Finding:
        """What is told of a rule's hit."""
        return cls(rule.id, hit.level, rule.title, hit.trials, hit.evidence, rule.explanation, rule.advice)

    def as_dict(self) -> dict[str, Any]:
        """For `audit.json`."""
        return {**asdict(self), "trials": list(self.trials)}
