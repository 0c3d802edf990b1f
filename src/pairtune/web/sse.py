"""Server-sent events."""

from __future__ import annotations

import json
from typing import Any


def event(name: str, **content: Any) -> str:
    """One event with its content as JSON."""
    return f"event: {name}\ndata: {json.dumps(content)}\n\n"
