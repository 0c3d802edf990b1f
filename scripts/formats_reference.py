"""Generates docs/formats.md from the formats themselves (`make docs`)."""

from __future__ import annotations

from pathlib import Path

from pairtune.data.formats import FORMATS, Format

FILE = Path(__file__).parents[1] / "docs" / "formats.md"

_HEAD = """# Formats of preference data

`pairtune data inspect SRC` says which of these a source has, which answer it takes for the better one, which fields it
does not use, and how many rows become pairs. Rows in, plus further pairs of rows with several, are pairs kept plus rows
dropped, by reason. Rows of the known formats are told apart by their keys; the first one that fits is used. `make docs`
writes this page.

| format | keys | the better answer |
|---|---|---|
"""

_TAIL = """
Every format may have `system` or `system_prompt`, and `tools`. Tools and thinking (`reasoning_content`, `thinking`) go
through the chat template where it has room for them, and are counted where it has none. Images are refused.

**Single answers** (unpaired feedback, thumbs) are read for the losses `kto`, `bco` and `apo_zero_unpaired`, which also
take pairs: each as a desirable and an undesirable answer. A label is true, 1, yes, good, up, like or 👍 for desirable
answers, and false, 0, -1, no, bad, down, dislike or 👎 for undesirable ones, whatever its type and case; rows without a
label are left out. Of Open WebUI's exports every answer with a thumb is read, in all branches of a chat.

## Any other table

Name the columns, with `--column PART=NAME`, or a YAML file's `columns`:

| you have | say |
|---|---|
| a prompt, a better and a worse answer | `--column prompt=ask --column chosen=good --column rejected=bad` |
| two answers and a label | `--column prompt=ask --answer-a left --answer-b right --label winner` |
| two answers and several annotators | `--label by_anna,by_ben,by_carl` (or a column with a list) |
| two answers and a score for each | `--answer-a left --answer-b right --score-a left_score --score-b right_score` |
| a list of rated answers | `--column answers=completions --column scores=rating` |
| a single answer and a label, for an unpaired loss | `--column prompt=ask --column completion=answer --label thumb` |

**A label's values** are never guessed. A value that names an answer (its column, or A, model_b, left, B>A …) says which
one is better, and so do the numbers 1 and 2. Other values, such as 0 and 1, mean either answer in one public file or
another: `--label-a VALUE` says which one means the first answer (with commas if several do). The only other value then
means the second one; if there are more, `--label-b` says which, and the rest are ties.

**Annotators**: the answer that more than half of them prefer is the better one; without such a majority the row is left
out. Rows in which they disagree are counted.

**Rated answers**: the best against the worst, or with `--pairs all` every two; `--min-gap` leaves out pairs whose
scores differ by less. Equal scores are a tie.

**Before it says ok**, `data inspect` asks whether the better answer is the right one (`--yes` says so). If `chosen` and
`rejected` are named for a file that has a column of labels, every command refuses, because the better answer may be in
either column; `--yes` says that it is not.
"""


def reference() -> str:
    """The content of the page."""
    rows = dict.fromkeys(map(_row, FORMATS))
    return _HEAD + "\n".join(rows) + "\n" + _TAIL


def _row(known: Format) -> str:
    keys = ", ".join(f"`{key}`" for key in known.keys)
    return f"| {known.name} | {keys} | {known.better} |"


if __name__ == "__main__":
    FILE.write_text(reference())
