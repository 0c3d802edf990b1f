"""What a rule is, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pairtune.evaluate.audit.evidence import Evidence, TrialLog
from pairtune.run.records import Finding, Level


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
        check: looks.
        needs: says what is missing of the evidence, so that the rule could not look; empty: nothing.
        lacks: says the same of a single trial.
        live: whether it is asked while trials run.
    """

    id: str
    title: str
    explanation: str
    advice: str
    check: Callable[[Evidence], Iterator[Hit]]
    needs: Callable[[Evidence], str] = lambda evidence: ""
    lacks: Callable[[TrialLog, Evidence], str] = lambda trial, evidence: ""
    live: bool = False

    def unseen(self, evidence: Evidence) -> tuple[str, dict[str, str]]:
        """What the rule could not look at: the reason where that is everything, and the reasons by trial."""
        if missing := self.needs(evidence):
            return missing, {}
        by_trial = {trial.name: missing for trial in evidence.trials if (missing := self.lacks(trial, evidence))}
        if len(by_trial) == len(evidence.trials):
            return next(iter(by_trial.values()), "trials"), by_trial
        return "", by_trial


def finding_of(rule: Rule, hit: Hit) -> Finding:
    """A hit with what its rule has to say about it."""
    return Finding(
        rule=rule.id,
        level=hit.level,
        title=rule.title,
        trials=hit.trials,
        evidence=hit.evidence,
        explanation=rule.explanation,
        advice=rule.advice,
    )
