"""What the pages' templates need beyond Django's own."""

from __future__ import annotations

from django import template
from django.utils.safestring import SafeString

from pairtune.run.records import Measured
from pairtune.web import text

register = template.Library()


@register.filter
def markdown(value: str) -> SafeString:
    """Markdown as HTML that can do no harm."""
    return text.markdown(value)


@register.filter
def interval(entry: Measured, metric: str) -> str:
    """A metric with its 95 % interval."""
    return entry.with_interval(metric)


@register.filter
def words(value: str) -> list[str]:
    """Parts between blanks."""
    return value.split()
