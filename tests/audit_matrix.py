"""The audit against logs of real TRL: which planted faults it finds, which it misses, and which honest logs it accuses.

`python tests/audit_matrix.py` writes the result for the recorded logs to docs/audit-matrix.md. The logs were made by
`tests/trl_runs.py`.
"""

from __future__ import annotations

import json
import lzma
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pairtune.evaluation.audit.check import audit
from pairtune.evaluation.audit.logged_rows import with_options
from pairtune.evaluation.audit.read import read_evidence
from pairtune.run.records import Finding

RECORDED = Path(__file__).with_name("data") / "trl-logs.json.xz"
PAGE = Path(__file__).parents[1] / "docs" / "audit-matrix.md"

# The rules that name each planted fault.
EXPECTED = {
    "model-reused": {"start-not-base", "trials-continue"},
    "model-reused-with-reference": {"reference-moved"},
    "wrong-reference": {"start-not-base"},
    "betas-swapped": {"beta-mislabelled"},
    "nothing-moves": {"no-effect"},
    "rate-drops": {"learning-rate-zero"},
    "rate-schedule": {"learning-rate-schedule"},
    "labels-swapped": {"below-chance"},
    "trained-on-evaluation": {"evaluates-training-pairs"},
    "saved-last": {"weights-not-reported"},
    "best-claim": {"weights-not-reported"},
    "not-a-number": {"nan-as-zero"},
    "overfitted": {"overfit"},
    "chosen-collapses": {"chosen-collapse"},
    "identical": {"trials-repeat"},
    "pasted": {"rows-repeat"},
    "evaluation-stale": {"rows-repeat"},
    "evaluations-order": {"evaluations-order"},
    "rows-order": {"rows-order"},
    "loss-too-low": {"loss-below-bound"},
    "loss-negative": {"loss-below-bound"},
    "loss-smoothed": {"loss-below-bound"},
    "loss-constant": {"frozen-column"},
    "norm-constant": {"frozen-column"},
    "margin": {"margin-arithmetic"},
    "accuracy-range": {"value-range"},
    "accuracy-against-margin": {"accuracy-contradiction"},
    "accuracy-of-rows": {"accuracy-impossible"},
    "logps-positive": {"log-prob-positive"},
    "rewards-sign": {"reward-sign", "margin-arithmetic"},
}
# Logs that do not hold the evidence: means over ten steps of a loss that was smoothed upwards break no bound.
NO_EVIDENCE = {"faulty/loss-smoothed-every-10"}


@dataclass(frozen=True)
class Log:
    """One log: its name, the fault that was planted ("" for none), and what a person would give to the audit."""

    name: str
    fault: str
    options: dict[str, Any]
    path: Path

    def findings(self) -> list[Finding]:
        """What the audit finds."""
        return audit(with_options(read_evidence(self.path), **self.options)).findings

    def found(self) -> set[str]:
        """The rules that name the planted fault, as errors, warnings or notes."""
        return {each.rule for each in self.findings()} & EXPECTED[self.fault]

    def wrong(self) -> list[Finding]:
        """Errors, and warnings that the log's own rows contradict."""
        return [each for each in self.findings() if each.level != "note" and not self._is_true(each)]

    def _is_true(self, finding: Finding) -> bool:
        """Whether a warning about an honest log is right, recomputed from the file's rows."""
        if finding.level == "error":
            return False
        trials = list(self._evaluations())
        if finding.rule == "few-rows":
            said = re.match(r"(\d+) validation row", finding.evidence)
            return said is not None and {int(said[1])} == set().union(*map(_counted, trials))
        if finding.rule == "overfit":
            return any(rows[-1]["eval_loss"] > min(row["eval_loss"] for row in rows) + 0.01 for rows in trials)
        if finding.rule == "no-effect":
            return (
                min(abs(rows[-1][f"eval_rewards/{side}"]) for rows in trials for side in ("chosen", "rejected")) < 0.01
            )
        if finding.rule == "below-chance":
            return all(rows[-1]["eval_rewards/accuracies"] < 0.5 for rows in trials)
        # Several betas are ranked by loss, and few rows do not tell trials apart: both are so in grids on 24 rows.
        return finding.rule in ("beta-ranking", "winner-unsettled") and len(finding.trials) > 1

    def _evaluations(self) -> Iterator[list[dict[str, Any]]]:
        for file in self.path.rglob("trainer_state.json"):
            rows = [row for row in json.loads(file.read_text())["log_history"] if "eval_loss" in row]
            if rows and "checkpoint-" not in str(file.parent.name):
                yield rows


def _counted(rows: list[dict[str, Any]]) -> set[int]:
    return {round(row["eval_runtime"] * row["eval_samples_per_second"]) for row in rows}


def unpack(folder: Path, file: Path = RECORDED) -> list[Log]:
    """Write the recorded logs into a folder, as TRL left them."""
    logs = []
    for name, log in json.loads(lzma.decompress(file.read_bytes())).items():
        for place, content in log["files"].items():
            target = folder / name / place
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(content if isinstance(content, str) else json.dumps(content))
        logs.append(Log(name, log["fault"], log["options"], folder / name))
    return logs


def page(logs: list[Log]) -> str:
    """The matrix as Markdown."""
    honest = [log for log in logs if not log.fault]
    accused = {log.name: [each for each in log.wrong() if each.level == "error"] for log in honest}
    warned = {log.name: [each.rule for each in log.wrong()] for log in honest}
    wrongly = [f"{name.removeprefix('honest/')} ({', '.join(rules)})" for name, rules in warned.items() if rules]
    lines = [
        "# The audit against TRL's logs",
        "",
        "Logs of TRL 1.16 on a tiny random model (`tests/trl_runs.py`), audited without options unless a log cannot",
        "hold the claim (swapped labels of beta, a stated number of rows). Written by `make docs`; `make test` checks",
        "it on the recorded logs, `make alarms` on newly made ones.",
        "",
        f"**Honest logs**: {len(honest)} over losses, schedules, batches, logging settings and grids. Errors: "
        f"{sum(map(bool, accused.values()))}. Wrong warnings: {len(wrongly)} ({len(wrongly) / len(honest):.1%})"
        + (f": {', '.join(wrongly)}." if wrongly else "."),
        "",
        "**Planted faults**, each logged at every step and at every tenth:",
        "",
        "| fault | logs | found | by |",
        "|---|---|---|---|",
    ]
    for fault in EXPECTED:
        planted = [log for log in logs if log.fault == fault]
        found = {log.name: log.found() for log in planted}
        rules = ", ".join(sorted(set().union(*found.values())))
        lines.append(f"| {fault} | {len(planted)} | {sum(map(bool, found.values()))} | {rules} |")
    missed = [log.name.removeprefix("faulty/") for log in logs if log.fault and not log.found()]
    lines += ["", f"Missed: {', '.join(missed) or 'none'}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        PAGE.write_text(page(unpack(Path(made))))
