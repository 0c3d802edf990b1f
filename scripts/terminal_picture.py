"""Draw what a command printed as a picture of a terminal.

python scripts/terminal_picture.py OUT.svg TEXT [--command "pairtune demo"] [--from WORDS] [--rows 40]

TEXT is a file with the command's output, in colour if it was made so (`FORCE_COLOR=1 COLUMNS=110 pairtune ... > TEXT`).
The picture begins at the first line that has WORDS in it, and says how many lines were left out before and after.
"""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 112


def picture(command: str, output: str, begins: str, rows: int) -> str:
    """An SVG of a terminal, without fonts from other hosts."""
    lines = Text.from_ansi(output).split()
    first = next((number for number, line in enumerate(lines) if begins in line.plain), 0) if begins else 0
    shown, after = lines[first : first + rows], len(lines) - first - rows
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_jupyter=False)
    console.print(Text.assemble(("$ ", "green"), (command, "bold")))
    if first:
        console.print(f"[dim]... {first} lines[/dim]", highlight=False)
    for line in shown:
        console.print(line, no_wrap=True, overflow="crop", highlight=False)
    if after > 0:
        console.print(f"[dim]... {after} lines[/dim]", highlight=False)
    svg = console.export_svg(title="pairtune")
    return re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL).replace("Fira Code", "ui-monospace, monospace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--command", default="pairtune demo")
    parser.add_argument("--from", dest="begins", default="")
    parser.add_argument("--rows", type=int, default=40)
    asked = parser.parse_args()
    output = asked.text.read_text(encoding="utf-8")
    asked.out.write_text(picture(asked.command, output, asked.begins, asked.rows), encoding="utf-8")


if __name__ == "__main__":
    main()
