"""The audit's result, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from pairtune.config import source_name
from pairtune.errors import plural
from pairtune.run.records import AuditRecord, Finding

_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def render_findings(audit: AuditRecord) -> RenderableType:
    """One line per finding."""
    lines = [("Audit\n", "bold")]
    for finding in audit.findings:
        lines += [(f"  {finding.level:8}", _STYLES[finding.level]), (f"{_line(finding)}\n", "")]
    if not audit.findings:
        lines.append(("  no findings\n", ""))
    return Text.assemble(*lines)


def render_audit(audit: AuditRecord) -> RenderableType:
    """The full audit: findings with explanation and advice, rules passed, and rules not checked."""
    return Group(*_parts(audit))


def _parts(audit: AuditRecord) -> Iterator[RenderableType]:
    yield Text(f"{audit.source}: {audit.kind}, {plural(len(audit.trials), 'trial')}\n", style="bold")
    explained = set()
    for finding in audit.findings:
        yield Text.assemble(
            (f"{finding.level}  ", _STYLES[finding.level]), (finding.title, "bold"), f"  [{finding.rule}]"
        )
        yield _indented(_line(finding, title=False))
        if finding.rule not in explained:
            yield _indented(finding.explanation, "dim")
            yield _indented(f"What to do: {finding.advice}", "dim")
        explained.add(finding.rule)
        yield Text()
    if audit.passed:
        yield Text(f"passed: {', '.join(audit.passed)}", style="green")
    for rule, lacking in audit.partly_checked.items():
        yield Text(f"partly checked: {rule} ({_partly(lacking)})", style="dim")
    for rule, missing in audit.not_checked.items():
        yield Text(f"not checked: {rule} (needs {missing})", style="dim")
    yield Text(f"verdict: {audit.verdict}", style=_STYLES.get(audit.verdict, "bold green"))


def _partly(trials: dict[str, str]) -> str:
    """The trials that a rule could not check, and what they lack."""
    return "; ".join(f"{name} lacks {missing}" for name, missing in trials.items())


def _indented(text: str, style: str = "") -> RenderableType:
    return Padding(Text(text, style=style), (0, 0, 0, 2))


def _line(finding: Finding, *, title: bool = True) -> str:
    names = ", ".join(finding.trials)
    said = f"{finding.title}: {finding.evidence}" if title else finding.evidence
    return f"{names}: {said}" if names else said


def audit_markdown(audit: AuditRecord) -> str:
    """The full audit as a Markdown document, one section per rule."""
    lines = [f"# Audit of {source_name(audit.source)}", ""]
    lines += [f"{audit.kind}, {plural(len(audit.trials), 'trial')}. Verdict: {audit.verdict}.", ""]
    for findings in audit.by_rule():
        first = findings[0]
        lines += [f"## {first.title} ({first.level}, `{first.rule}`)", ""]
        lines += [f"- {_line(finding, title=False)}" for finding in findings]
        lines += ["", first.explanation, "", f"**What to do:** {first.advice}", ""]
    lines += [f"Passed: {', '.join(audit.passed) or 'nothing'}.", ""]
    if partly := audit.partly_checked:
        lines += ["Partly checked:", "", *(f"- {rule}: {_partly(trials)}" for rule, trials in partly.items()), ""]
    if audit.not_checked:
        lines += ["Not checked:", ""]
        lines += [f"- {rule}: needs {missing}" for rule, missing in audit.not_checked.items()]
    return "\n".join(lines).rstrip() + "\n"
