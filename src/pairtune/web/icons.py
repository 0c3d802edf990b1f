"""The site's icons: a few of Lucide's, served from here in one file that pages refer to."""

from __future__ import annotations

import hashlib
import re
from functools import cache

from django.http import HttpRequest, HttpResponse
from django.views.decorators.http import require_GET
from lucide.jinja import lucide

ICONS = (
    *("arrow-down", "arrow-up", "chevron-left", "chevron-right", "circle-check", "columns-2", "copy", "copy-plus"),
    *("download", "file-text", "flag", "keyboard", "menu", "message-square", "monitor", "moon", "pencil", "pin"),
    *("pin-off", "play", "plus", "refresh-cw", "repeat", "search", "settings-2", "share-2", "square", "sun"),
    *("table-2", "thumbs-down", "thumbs-up", "trash-2", "trophy", "undo-2", "x"),
)
_YEAR = 31_536_000


@cache
def sheet() -> str:
    """All icons as symbols of one SVG file."""
    symbols = (_symbol(name) for name in ICONS)
    return f'<svg xmlns="http://www.w3.org/2000/svg">{"".join(symbols)}</svg>'


def _symbol(name: str) -> str:
    drawn = str(lucide(name, size=24))
    inside = drawn[drawn.index(">") + 1 : drawn.rindex("</svg>")]
    paths = re.sub(r"\s+", " ", inside).strip()
    return f'<symbol id="{name}" viewBox="0 0 24 24">{paths}</symbol>'


@cache
def version() -> str:
    """Changes when the icons change, so that browsers may keep them for ever."""
    return hashlib.sha256(sheet().encode()).hexdigest()[:12]


@require_GET
def icons(_: HttpRequest) -> HttpResponse:
    """Serve the file of all icons."""
    headers = {"Cache-Control": f"public, max-age={_YEAR}, immutable"}
    return HttpResponse(sheet(), content_type="image/svg+xml", headers=headers)
