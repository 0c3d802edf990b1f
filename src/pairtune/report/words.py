"""Numbers as people read them."""

from __future__ import annotations

import re
from pathlib import PurePath

_FILES = (".jsonl", ".json", ".csv", ".parquet", ".gz", ".zst")


def duration(seconds: float) -> str:
    """Minutes and seconds, with hours where there are some."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def source_name(source: str) -> str:
    """A source of pairs without the folders of the machine that it lay on; a Hub id stays whole."""
    path = re.sub(r":\d+$", "", source.partition("@")[0])  # without the row of an origin
    local = path.startswith(("/", ".", "~")) or PurePath(path).suffix in _FILES or path.count("/") > 1
    return PurePath(source).name if local else source


def p_value(value: float) -> str:
    """A p-value; small ones as a bound."""
    return f"p = {value:.3f}" if value >= 0.001 else "p < 0.001"
