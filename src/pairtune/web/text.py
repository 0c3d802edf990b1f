"""Untrusted Markdown to safe HTML."""

from __future__ import annotations

import difflib
import re

import nh3
from django.utils.html import escape
from django.utils.safestring import SafeString, mark_safe
from markdown_it import MarkdownIt

_MARKDOWN = MarkdownIt("commonmark", {"html": False, "linkify": False, "breaks": True}).enable(
    ["table", "strikethrough"]
)
_TAGS = {
    *("p", "br", "em", "strong", "s", "code", "pre", "blockquote", "hr", "ul", "ol", "li"),
    *("h1", "h2", "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td", "a"),
}
# Control characters except tab and newline, and bidirectional overrides.
_UNSHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]")


def markdown(text: str) -> SafeString:
    """Render and sanitise; no images, so that nothing is fetched from other hosts."""
    html = _MARKDOWN.render(_UNSHOWN.sub("\N{REPLACEMENT CHARACTER}", text))
    safe = nh3.clean(
        html,
        tags=_TAGS,
        attributes={"a": {"href"}, "ol": {"start"}},
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
    )
    return mark_safe(safe)  # noqa: S308 - sanitised in the line above


def marked_differences(one: str, other: str) -> tuple[SafeString, SafeString]:
    """Both texts, with the words that differ in `<mark>`."""
    words: list[list[str]] = [re.findall(r"\s+|[^\s]+", text) for text in (one, other)]
    matcher = difflib.SequenceMatcher(None, words[0], words[1], autojunk=False)
    sides: tuple[list[str], list[str]] = ([], [])
    for kind, a, b, c, d in matcher.get_opcodes():
        for side, part in zip(sides, (words[0][a:b], words[1][c:d]), strict=True):
            text = escape("".join(part))
            side.append(f"<mark>{text}</mark>" if kind != "equal" and text.strip() else text)
    return mark_safe("".join(sides[0])), mark_safe("".join(sides[1]))  # noqa: S308 - escaped word by word
