"""Numbers as people read them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Minutes and seconds, with hours where there are some."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def p_value(value: float) -> str:
    """A p-value; small ones as a bound."""
    return f"p = {value:.3f}" if value >= 0.001 else "p < 0.001"
