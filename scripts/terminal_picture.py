"""Draw what a command printed as a moving picture of a terminal.

    script -qc "stty cols 110; pairtune demo" TEXT
    python scripts/terminal_picture.py OUT.svg TEXT [--command "pairtune demo"] [--show WORDS] [--rows 30]

The picture shows the command, some moments of its live view, then what it left on the screen: for each WORDS the part
that begins with the first line that has them. It plays faster than the command ran. It is one file, an SVG without
scripts and without fonts from other hosts; where nothing is to move, the last part is shown.
"""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 112
MOMENTS = 8
SECONDS_OF_MOMENT, SECONDS_OF_PART = 0.7, 5.0
_CONTROL = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|\n|\r|[^\x1b\n\r]+")


def screens(output: str) -> Iterator[list[str]]:
    """The lines on the screen, colours included, whenever some are about to be drawn again, and at the end."""
    lines, row = [""], 0
    moved = False
    for found in _CONTROL.finditer(output):
        text, code = found.group(), found[2]
        if code == "A":
            if not moved:
                yield list(lines)
            row, moved = max(0, row - int(found[1] or 1)), True
            continue
        moved = moved and code == "K"
        if code == "K":
            lines[row] = ""
        elif text == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif code == "m" or (code is None and text != "\r"):
            lines[row] += text
    yield lines


def frames(command: str, output: str, shown: list[str], rows: int) -> Iterator[tuple[float, Text]]:
    """What is to be seen and for how many seconds."""
    prompt = Text.assemble(("$ ", "green"), (command, "bold"), "\n")
    yield SECONDS_OF_MOMENT, prompt
    *moving, last = screens(output)
    for number in range(min(MOMENTS, len(moving))):
        moment = moving[number * len(moving) // MOMENTS]
        yield SECONDS_OF_MOMENT, prompt + Text("\n").join(map(Text.from_ansi, moment[-rows:]))
    end = [Text.from_ansi(line) for line in last]
    for words in shown:
        first = next(number for number, line in enumerate(end) if words in line.plain)
        yield SECONDS_OF_PART, Text("\n").join(end[first : first + rows])


def picture(parts: list[tuple[float, Text]], rows: int) -> str:
    """An SVG in which one part after another is visible."""
    whole, before = sum(seconds for seconds, _ in parts), 0.0
    drawn, styles = [], []
    for number, (seconds, text) in enumerate(parts):
        console = Console(record=True, width=WIDTH, file=io.StringIO(), force_jupyter=False, markup=False)
        lines = text.split(allow_blank=True)[:rows]
        for line in [*lines, *[Text()] * (rows - len(lines))]:
            console.print(line, no_wrap=True, overflow="crop", highlight=False)
        svg = console.export_svg(title="pairtune", unique_id=f"part{number}")
        svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL).replace("Fira Code", "ui-monospace, monospace")
        drawn.append(f'<g id="shown{number}">{svg}</g>')
        begin, end = (round(100 * each / whole, 2) for each in (before, before + seconds))
        hidden = "" if number == len(parts) - 1 else "visibility: hidden; "
        frames_of = f"0% {{ visibility: hidden; }} {begin}% {{ visibility: visible; }} {end}% {{ visibility: hidden; }}"
        styles.append(f"#shown{number} {{ {hidden}animation: show{number} {whole:g}s step-end infinite; }}")
        styles.append(f"@keyframes show{number} {{ {frames_of} }}")
        before += seconds
    size = drawn[0].partition('viewBox="')[2].partition('"')[0]
    still = "@media (prefers-reduced-motion: reduce) { g[id^=shown] { animation: none; } }"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}"><style>{" ".join(styles)} {still}</style>'
        f"{''.join(drawn)}</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--command", default="pairtune demo")
    parser.add_argument("--show", action="append", default=[])
    parser.add_argument("--rows", type=int, default=30)
    asked = parser.parse_args()
    written = asked.text.read_bytes().decode().replace("\r\n", "\n")  # lone carriage returns stay
    output = re.sub(r"^Script (started|done) .*\n", "", written, flags=re.MULTILINE)
    parts = list(frames(asked.command, output, asked.show, asked.rows))
    asked.out.write_text(picture(parts, asked.rows), encoding="utf-8")


if __name__ == "__main__":
    main()
