"""Audit rules and what they find."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pairtune.evaluation.audit.evidence import Evidence, TrialLog
from pairtune.run.records import Finding, Level


@dataclass(frozen=True)
class Hit:
    """One fault found by a rule.

    Attributes:
        level: `error`: the result is wrong; `warning`: it does not mean what it seems to; `note`: worth knowing.
        trials: names of the trials concerned; empty: the run as a whole.
        evidence: the numbers, in one sentence.
    """

    level: Level
    trials: tuple[str, ...]
    evidence: str


@dataclass(frozen=True)
class Rule:
    """One kind of fault to check for.

    Attributes:
        id: a short, stable name.
        title: the fault in a few words.
        explanation: why it matters, for a reader who has never met it.
        advice: what to do.
        check: yields the hits.
        needs: returns what evidence the rule needs but does not have; empty: it has all.
        lacks: returns the same for a single trial.
        live: whether the rule is checked while trials run.
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
        """What the rule could not check: the reason if that is everything, and the reasons by trial."""
        if missing := self.needs(evidence):
            return missing, {}
        by_trial = {trial.name: missing for trial in evidence.trials if (missing := self.lacks(trial, evidence))}
        if len(by_trial) == len(evidence.trials):
            return next(iter(by_trial.values()), "trials"), by_trial
        return "", by_trial


def finding_of(rule: Rule, hit: Hit) -> Finding:
    """A hit with its rule's title, explanation and advice."""
    return Finding(
        rule=rule.id,
        level=hit.level,
        title=rule.title,
        trials=hit.trials,
        evidence=hit.evidence,
        explanation=rule.explanation,
        advice=rule.advice,
    )
