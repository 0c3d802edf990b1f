"""Numbers in readable form."""

from __future__ import annotations

from pairtune.run.records import Comparison


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
