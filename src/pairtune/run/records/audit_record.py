"""audit.json: what the audit found."""

from __future__ import annotations

from typing import Literal

from pairtune.run.records.base import Level, Part, Record


class Finding(Part):
    """Something that an audit rule has found.

    Attributes:
        rule: id of the rule.
        level: `error`: what is reported is wrong; `warning`: it does not mean what it seems to; `note`: worth knowing.
        title: the finding in a few words.
        trials: names of the affected trials; empty if it concerns the run as a whole.
        evidence: the numbers, in one sentence.
        explanation: why it matters.
        advice: what to do.
    """

    rule: str
    level: Level
    title: str
    trials: tuple[str, ...]
    evidence: str
    explanation: str
    advice: str


class AuditRecord(Record):
    """What the audit rules found in a run, or in the log of another tool.

    Attributes:
        source: the file or folder that was read, of the given `kind`.
        trials: names of the trials.
        passed: ids of the rules that found nothing.
        not_checked: by rule id, the data that a rule lacked.
        partly_checked: by id of a rule that passed, the data that it lacked for some trials.
        verdict: the worst level found, or "clean".
    """

    file = "audit.json"

    source: str
    kind: str
    trials: list[str]
    findings: list[Finding]
    passed: list[str] = []
    not_checked: dict[str, str] = {}
    partly_checked: dict[str, dict[str, str]] = {}
    verdict: Level | Literal["clean"]

    def by_rule(self) -> list[list[Finding]]:
        """The findings, those of one rule together, in their order, which is the worst first."""
        groups: dict[str, list[Finding]] = {}
        for finding in self.findings:
            groups.setdefault(finding.rule, []).append(finding)
        return list(groups.values())
