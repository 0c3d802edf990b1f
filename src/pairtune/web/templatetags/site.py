"""Template filters of the site."""

from __future__ import annotations

from django import template
from django.utils.safestring import SafeString

from pairtune.run.records import Measured
from pairtune.web import text

register = template.Library()


@register.filter
def markdown(value: str) -> SafeString:
    """Render Markdown as sanitised HTML."""
    return text.markdown(value)


@register.filter
def interval(entry: Measured, metric: str) -> str:
    """Format a metric with its 95 % interval."""
    return entry.with_interval(metric)


@register.filter
def words(value: str) -> list[str]:
    """Split at white space."""
    return value.split()
