"""Apply the audit's rules to evidence."""

from __future__ import annotations

from collections.abc import Sequence

from pairtune.evaluation.audit import arithmetic, claims, continuations, learning, numbers, repeats, schedule, starts
from pairtune.evaluation.audit.evidence import Evidence
from pairtune.evaluation.audit.rule import Rule, finding_of
from pairtune.run.records import LEVELS, AuditRecord, Finding

_ROOMS = (arithmetic, repeats, schedule, starts, continuations, numbers, learning, claims)
RULES: tuple[Rule, ...] = tuple(rule for room in _ROOMS for rule in room.RULES)


def find(evidence: Evidence, rules: Sequence[Rule] = RULES) -> list[Finding]:
    """Findings of the rules, the worst first, otherwise in the order of the rules."""
    found = [finding_of(rule, hit) for rule in rules if not rule.needs(evidence) for hit in rule.check(evidence)]
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))


def audit(evidence: Evidence) -> AuditRecord:
    """Findings, the rules that passed, and those that could not be checked."""
    findings = find(evidence)
    hit = {finding.rule for finding in findings}
    unseen = {rule.id: rule.unseen(evidence) for rule in RULES if rule.id not in hit}
    lacking = {name: missing for name, (missing, _) in unseen.items() if missing}
    worst = [level for level in LEVELS if any(finding.level == level for finding in findings)]
    return AuditRecord(
        source=str(evidence.source),
        kind=evidence.kind,
        trials=[trial.name for trial in evidence.trials],
        findings=findings,
        passed=[rule.id for rule in RULES if rule.id not in hit and rule.id not in lacking],
        not_checked=lacking,
        partly_checked={name: trials for name, (missing, trials) in unseen.items() if trials and not missing},
        verdict=worst[0] if worst else "clean",
    )


def find_live(evidence: Evidence) -> list[Finding]:
    """Findings of the rules that apply while trials run."""
    return find(evidence, [rule for rule in RULES if rule.live])
