"""Template filters and tags of the site."""

from __future__ import annotations

import re
from functools import cache

from django import template
from django.urls import reverse
from django.utils.html import format_html
from django.utils.safestring import SafeString, mark_safe

from pairtune.config import source_name
from pairtune.report.charts import draw_interval
from pairtune.report.report_data import BeforeAfter
from pairtune.run.records import Measured
from pairtune.votes.standings import Effect, Standing, Standings
from pairtune.web import icons, text

register = template.Library()


@register.filter
def markdown(value: str) -> SafeString:
    """Render Markdown as sanitised HTML."""
    return text.markdown(value)


@register.filter
def unfinished(value: str) -> SafeString:
    """Render the Markdown of an answer that is being written; not kept, since it changes at once."""
    return text.markdown.__wrapped__(value)


@register.filter
def shortened(model: str | None) -> str:
    """A model's name with the beginning of its commit, if it is pinned to one."""
    return re.sub("#([0-9a-f]{7})[0-9a-f]{33}$", r"#\1", model or "")


@register.filter
def interval(entry: Measured, metric: str) -> str:
    """Format a metric with its 95 % interval."""
    return entry.with_interval(metric)


@register.filter
def changes(both: BeforeAfter) -> tuple[SafeString, SafeString]:
    """The answers of base and tuned model, with what is only in one of them marked."""
    return text.marked_differences(both.base.text, both.tuned.text)


@register.filter
def strength(entry: Standing, standings: Standings) -> SafeString:
    """Draw a model's strength with its interval, on the scale of all of them."""
    ends = [end for each in standings.models for end in each.interval]
    return mark_safe(draw_interval(entry.strength, entry.interval, ends, entry.model))  # noqa: S308 - escaped there


@register.filter
def effect(found: Effect, choices: str) -> str:
    """Say how votes are biased: which of two `choices`, separated by a comma, how much more often."""
    more, less = choices.split(",")
    low, high = sorted(abs(end) for end in found.interval)
    if not found.shows:
        return (
            f"none shows: {more} {found.share:+.0%} more often ({found.interval[0]:+.0%} to {found.interval[1]:+.0%})"
        )
    return f"{more if found.share > 0 else less} {abs(found.share):.0%} more often ({low:.0%} to {high:.0%})"


@register.filter
def percent(share: float) -> str:
    """Format a share."""
    return f"{share:.0%}"


register.filter("source_name", source_name)
register.filter("without_flags", text.without_flags)


@register.filter
def words(value: str) -> list[str]:
    """Split at white space."""
    return value.split()


@register.simple_tag
@cache
def icon(name: str) -> SafeString:
    """Draw an icon of the size of the text around it; the control that it is in needs a name of its own."""
    if name not in icons.ICONS:
        raise ValueError(f"{name} is not among the site's icons")
    address = f"{reverse('icons')}?{icons.version()}#{name}"
    return format_html('<svg class="icon" aria-hidden="true"><use href="{}"/></svg>', address)
