"""Untrusted Markdown to safe HTML: tables, highlighted code, formulas, text in either direction."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import nh3
from django.utils.html import escape
from django.utils.safestring import SafeString, mark_safe
from latex2mathml.converter import convert as to_mathml
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.texmath import texmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from pairtune.screen import harmless

# Longer code is shown without colours, since an answer is rendered ten times a second while it is written.
_HIGHLIGHTED = 20_000
# Pairs of equal words, one from each text, up to which difflib compares them: its time grows faster than their number,
# so that a few hundred repetitions of one word take seconds. Two ordinary answers of 1,500 words have about 15,000.
_MOST_MATCHES = 20_000
_MOST_PLACES = 4_000_000  # words of one times words of the other: two answers of 2,000

_MATHML = {
    *("math", "mrow", "mi", "mn", "mo", "ms", "mtext", "mspace", "mfrac", "msqrt", "mroot", "msub", "msup", "msubsup"),
    *("munder", "mover", "munderover", "mtable", "mtr", "mtd", "mstyle", "mpadded", "mphantom", "menclose", "mfenced"),
}
_TAGS = {
    *("p", "br", "em", "strong", "s", "code", "pre", "blockquote", "hr", "ul", "ol", "li", "div", "span", "button"),
    *("h1", "h2", "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td", "a"),
    *_MATHML,
}
_MATH_ATTRIBUTES = {
    *("display", "mathvariant", "stretchy", "fence", "separator", "form", "accent", "accentunder", "columnalign"),
    *("rowspacing", "columnspacing", "linethickness", "width", "height", "depth", "lspace", "rspace", "minsize"),
    *("maxsize", "displaystyle", "scriptlevel", "movablelimits", "notation", "open", "close", "separators"),
}
_ATTRIBUTES: dict[str, set[str]] = {
    "a": {"href"},
    "ol": {"start"},
    "button": {"type", "data-copy-code"},
    "div": {"tabindex", "role", "aria-label"},
    "pre": {"tabindex", "role", "aria-label"},
    "*": {"dir", "class"},
    **dict.fromkeys(_MATHML, _MATH_ATTRIBUTES),
}
# Blocks whose direction follows their first strong character.
_DIRECTED = {
    *("paragraph_open", "heading_open", "blockquote_open", "bullet_list_open", "ordered_list_open"),
    *("th_open", "td_open"),
}
_FORMATTER = HtmlFormatter(nowrap=True)


def _directed(state: Any) -> None:
    """Let every block find its own direction; a column's alignment becomes a class, since styles are not allowed."""
    for token in state.tokens:
        if token.type not in _DIRECTED:
            continue
        token.attrSet("dir", "auto")
        if aligned := re.fullmatch(r"text-align:(right|center)", str(token.attrGet("style") or "")):
            token.attrSet("class", f"to-{aligned[1]}")


def _fence(self: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    """A block of code with its language, highlighted, and a button that copies it."""
    token = tokens[index]
    language = token.info.split()[0] if token.info.strip() else ""
    name = escape(language or "code")
    return (
        f'<div class="code"><div class="code-head"><span>{name}</span>'
        f'<button type="button" class="quiet" data-copy-code="">Copy</button></div>'
        f'<pre tabindex="0" role="group" aria-label="Code: {name}"><code>{_coloured(token.content, language)}'
        "</code></pre></div>\n"
    )


def _coloured(code: str, language: str) -> str:
    if not language or len(code) > _HIGHLIGHTED:
        return str(escape(code))
    try:
        return str(highlight(code, get_lexer_by_name(language), _FORMATTER))
    except ClassNotFound:
        return str(escape(code))


def _math(self: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    """A formula as MathML; one that cannot be parsed, such as one still being written, as it was written."""
    token = tokens[index]
    block = token.type != "math_inline"
    try:
        formula = to_mathml(token.content.strip(), display="block" if block else "inline")
    except Exception:  # noqa: BLE001 - the converter raises whatever its parser stumbles over, IndexError and KeyError among them
        formula = f"<code>{escape(token.content)}</code>"
    return f'<div class="formula" tabindex="0" role="group" aria-label="Formula">{formula}</div>' if block else formula


def _table_open(self: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    return '<div class="wide" tabindex="0" role="group" aria-label="Table"><table>\n'


def _table_close(self: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    return "</table></div>\n"


def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "linkify": False, "breaks": True})
    parser.enable(["table", "strikethrough"])
    # $x$ and $$x$$ without space inside or digits around, so that prices stay prices; \(x\) and \[x\].
    parser.use(dollarmath_plugin, allow_space=False, allow_digits=False, double_inline=True)
    parser.use(texmath_plugin, delimiters="brackets")
    parser.core.ruler.push("directed", _directed)
    for name, rule in {"fence": _fence, "code_block": _fence, "table_open": _table_open}.items():
        parser.add_render_rule(name, rule)
    parser.add_render_rule("table_close", _table_close)
    for name in ("math_inline", "math_inline_double", "math_block", "math_block_label", "math_block_eqno"):
        parser.add_render_rule(name, _math)
    return parser


_MARKDOWN = _parser()


@lru_cache(maxsize=256)  # a conversation's earlier answers are shown with every page of it
def markdown(text: str) -> SafeString:
    """Render and sanitise; no images, so that nothing is fetched from other hosts."""
    html = _MARKDOWN.render(plain(text))
    safe = nh3.clean(
        html,
        tags=_TAGS,
        attributes=_ATTRIBUTES,
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
    )
    return mark_safe(safe)  # noqa: S308 - sanitised in the line above


def plain(text: str) -> str:
    """Text with plain line ends, and without characters that hide or reorder others."""
    return harmless(text.replace("\r\n", "\n").replace("\r", "\n"))


def without_flags(text: str) -> str:
    """A sentence of the command line, for people who do not type commands."""
    said = re.sub(r"\bas --[\w-]+ says", "as you said", text)
    return re.sub(r"--([a-z][\w-]*)", lambda flag: flag[1].replace("-", " "), said)


@lru_cache(maxsize=256)  # comparing takes milliseconds, and a page has dozens of texts
def marked_differences(before: str, after: str) -> tuple[SafeString, SafeString]:
    """Both texts: words only in `before` in `<del>`, words only in `after` in `<ins>`.

    Of two texts that repeat themselves too often to be compared word by word, all between their common beginning and
    their common end is marked.
    """
    words: list[list[str]] = [re.findall(r"\S+\s*|\s+", plain(text)) for text in (before, after)]
    compared = [[word.rstrip() for word in each] for each in words]
    counts = [Counter(each) for each in compared]
    matches = sum(count * counts[1][word] for word, count in counts[0].items())
    opcodes: Sequence[tuple[str, int, int, int, int]]
    if matches <= _MOST_MATCHES and len(words[0]) * len(words[1]) <= _MOST_PLACES:
        opcodes = difflib.SequenceMatcher(None, compared[0], compared[1], autojunk=False).get_opcodes()
    else:
        opcodes = _ends_in_common(*compared)
    sides: tuple[list[str], list[str]] = ([], [])
    for kind, a, b, c, d in opcodes:
        for side, tag, part in ((sides[0], "del", words[0][a:b]), (sides[1], "ins", words[1][c:d])):
            text = "".join(part)
            shown, space = escape(text.rstrip()), text[len(text.rstrip()) :]
            side.append(f"<{tag}>{shown}</{tag}>{space}" if kind != "equal" and shown else shown + space)
    return mark_safe("".join(sides[0])), mark_safe("".join(sides[1]))  # noqa: S308 - escaped word by word


def _ends_in_common(before: list[str], after: list[str]) -> list[tuple[str, int, int, int, int]]:
    """Opcodes like difflib's: a common beginning, a middle that is replaced, a common end."""
    shorter = min(len(before), len(after))
    start = next((at for at in range(shorter) if before[at] != after[at]), shorter)
    end = next((at for at in range(shorter - start) if before[-1 - at] != after[-1 - at]), shorter - start)
    middle, last = (len(before) - end, len(after) - end), (len(before), len(after))
    return [
        ("equal", 0, start, 0, start),
        ("replace", start, middle[0], start, middle[1]),
        ("equal", middle[0], last[0], middle[1], last[1]),
    ]
