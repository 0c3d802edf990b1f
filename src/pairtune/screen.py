"""What reaches a terminal: nothing in a file's texts or a model's answers may move its cursor or change its title."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderResult

# Control characters except tab and newline, and bidirectional overrides, which reorder what follows.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def harmless(text: str) -> str:
    """A text with a visible sign in place of characters that control terminals, or hide or reorder others."""
    return _HIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)


def screen(*, stderr: bool = False, width: int | None = None) -> Console:
    """A console that prints harmless texts with its own colours; what a spinner says, which is ours, is not changed.

    In a notebook it prints lines, as into a file: a live view there would be one output after another.
    """
    from rich.console import Console

    notebook = "ipykernel" in sys.modules  # whose streams say that they are a terminal
    # No markup: names of files and columns, and what rows say, may have brackets.
    console = Console(
        stderr=stderr, width=width, force_jupyter=False, force_terminal=False if notebook else None, markup=False
    )
    console.push_render_hook(_Hook())  # type: ignore[arg-type] # the base class would import rich with this module
    return console


class _Hook:
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Harmless(renderables)]


@dataclass(frozen=True)
class _Harmless:
    parts: Sequence[ConsoleRenderable]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.segment import Segment

        for part in self.parts:
            for segment in console.render(part, options):
                yield segment if segment.control else Segment(harmless(segment.text), segment.style)
