"""What the pages' templates need beyond Django's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django import template
from django.utils.safestring import SafeString

from pairtune.web import text

register = template.Library()


@register.filter
def markdown(value: str) -> SafeString:
    """Markdown as HTML that can do no harm."""
    return text.markdown(value)


@register.filter
def interval(entry: Mapping[str, Any], metric: str) -> str:
    """A metric with its 95 % interval, where it has one."""
    value = entry["metrics"][metric]
    bounds = entry.get("intervals", {}).get(metric)
    return f"{value:.4f}" + (f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else "")


@register.filter
def words(value: str) -> list[str]:
    """Parts between blanks."""
    return value.split()
