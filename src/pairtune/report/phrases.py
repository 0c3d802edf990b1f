"""Numbers in readable form."""

from __future__ import annotations

from pairtune.config import source_name
from pairtune.run.records import Comparison, Lineage


def described_start(lineage: Lineage) -> str:
    """Where a run started that went on from a tuned model, and what its numbers compare it with."""
    start = lineage.start
    how = {
        "continue": f"The trials train the adapter of {start.name} further",
        "new": f"The trials train a new adapter on {start.name}, merged",
        "whole": f"The trials start from {start.name}, of which all weights were tuned",
    }[lineage.on_top]
    against = start.name if lineage.reference == "start" else source_name(lineage.base)
    return f"{how} (weights {start.weights}); what is called the base here, and in all comparisons, is {against}"


def chain(lineage: Lineage) -> list[str]:
    """The models that a run goes back to, the base first, each tuned one with the fingerprint of its weights."""
    tuned = [
        f"{parent.name} (weights {parent.weights}" + (f", tuned on {', '.join(parent.data)})" if parent.data else ")")
        for parent in reversed(lineage.parents)
    ]
    return [source_name(lineage.base), *tuned]


def duration(seconds: float) -> str:
    """Minutes and seconds, or hours and minutes from one hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def short(value: object) -> str:
    """A setting's value; numbers without needless digits."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def p_value(value: float) -> str:
    """A p-value; small ones as an upper bound."""
    return f"p = {value:.3f}" if value >= 0.001 else "p < 0.001"


def differs(comparison: Comparison | None) -> str:
    """Whether a trial differs from the winner; empty for the winner itself."""
    if comparison is None:
        return ""
    return f"{'yes' if comparison.differs else 'not shown'} ({p_value(comparison.p_corrected)})"
