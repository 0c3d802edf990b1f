"""What the names of columns suggest.

Used to warn, and to propose a command for rows in no known format; never to label.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from pairtune.data.conversations import field_names
from pairtune.data.formats import FORMATS, PROMPTS, Format
from pairtune.data.judged_rows import Verdict
from pairtune.data.pair_rows import Row
from pairtune.data.preference import BadRow

ITEM_SCORES = ("score", "rating", "overall_score", "reward", "rank")

# Columns that may say which of two answers is better, in lower case with underscores.
_LABELS = re.compile(
    r"(^|_)(labels?|winner|preference|preferred|choice|better|best|verdict|votes?|judge?ment|which|annotator|gold)(_|$)"
)
_FIRST = re.compile(r"(?:^|[_ ]|(?<=[a-z]))(a|1|0|first|left)$", re.I)
_SECONDS = {"a": "b", "1": "2", "0": "1", "first": "second", "left": "right"}
_BETTER = ("chosen", "preferred", "accepted", "good", "better", "positive", "win", "pos")
_WORSE = ("rejected", "dispreferred", "refused", "bad", "worse", "negative", "lose", "neg")


def side_of(column: str) -> Verdict | None:
    """Which answer a column's name says it is, by its last part: response_b, answer2, right."""
    ending = _FIRST.search(column)
    if ending:
        return "a"
    other = re.search(r"(?:^|[_ ]|(?<=[a-z]))(b|2|second|right)$|^(right)_", column, re.I)
    return "b" if other else "a" if re.match("left_", column, re.I) else None


def unknown_format(row: Row, source: str) -> BadRow:
    """The fault of a row in no known format, with the three nearest ones and a command that would read it."""
    nearest = ", ".join(_nearest(row))
    return BadRow(
        "unknown format",
        "",
        f"is in no known format; it has {field_names(row)}. Nearest are {nearest}. If it is another format, name the "
        f"columns: pairtune data inspect {shlex.quote(source)} {as_flags(proposed_columns(row))}",
    )


def _nearest(row: Row) -> list[str]:
    """The three formats that share most with a row's keys, each with the keys that it needs."""

    def likeness(known: Format) -> float:
        best = (max(SequenceMatcher(None, key, str(name)).ratio() for name in row) for key in known.keys) if row else ()
        return sum(best) / len(known.keys)

    ranked = sorted(FORMATS, key=likeness, reverse=True)
    names = dict.fromkeys(f"{known.name} ({', '.join(known.keys)})" for known in ranked)
    return list(names)[:3]


def proposed_columns(row: Row) -> dict[str, str]:
    """The columns that a row seems to have, by their names."""
    if labels := [str(name) for name in row if is_label(name)]:
        return judged_columns(row, labels[0])
    first, second = _two_answers(row)
    scores = [str(name) for name in row if re.search("score|rating|reward", str(name), re.I)]
    of_first, of_second = ([name for name in scores if side_of(name) == side] for side in ("a", "b"))
    if first and len(of_first) == len(of_second) == 1:
        pair = {"answer_a": first, "answer_b": second, "score_a": of_first[0], "score_b": of_second[0]}
        return {"prompt": _like(row, PROMPTS), **pair}
    for name, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping) and set(ITEM_SCORES) & value[0].keys():
            return {"prompt": _like(row, PROMPTS), "answers": str(name)}
    return {"prompt": _like(row, PROMPTS), "chosen": _like(row, _BETTER), "rejected": _like(row, _WORSE)}


def judged_columns(row: Row, label: str) -> dict[str, str]:
    """The columns of two answers that a label judges, as far as their names tell."""
    first, second = _two_answers(row)
    return {
        "prompt": _like(row, PROMPTS),
        "label": label,
        "answer_a": first or "NAME",
        "answer_b": second or "NAME",
    }


def as_answers(columns: Mapping[Any, str]) -> dict[str, str]:
    """The prompt, and `chosen` and `rejected` as the two answers that a label judges."""
    names = {"prompt": "prompt", "chosen": "answer_a", "rejected": "answer_b"}
    return {names[part]: name for part, name in columns.items() if part in names}


def _two_answers(row: Row) -> tuple[str, str]:
    """Two columns whose names differ only in a letter or number at their end."""
    for name in map(str, row):
        ending = _FIRST.search(name)
        if ending:
            other = _SECONDS[ending[1].lower()]
            second = name[: ending.start(1)] + (other.upper() if ending[1].isupper() else other)
            if second in row and not re.search("score|rating|model|is_", name, re.I):
                return name, second
    return "", ""


def _like(row: Row, words: Sequence[str]) -> str:
    """The column whose name is, or contains, one of these words."""
    names = [str(name) for name in row]
    for fits in (lambda name, word: name.lower() == word, lambda name, word: word in _words(name)):
        for word in words:
            for name in names:
                if fits(name, word):
                    return name
    return "NAME"


def is_label(name: Any) -> bool:
    """Whether a column's name suggests that it says which answer is better."""
    return bool(_LABELS.search("_".join(_words(str(name)))))


def _words(name: str) -> list[str]:
    """The words of a column's name in lower case: betterAnswer, better-answer and better_answer are the same."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", name)]


_SHORT = ("label", "answer_a", "answer_b", "score_a", "score_b")


def as_flags(columns: Mapping[str, str]) -> str:
    """The columns as command-line flags."""
    flags = []
    for part, name in columns.items():
        if part == "prompt" and name == "prompt":
            continue
        short = f"--{part.replace('_', '-')} {shlex.quote(name)}"
        flags.append(short if part in _SHORT else f"--column {part}={shlex.quote(name)}")
    return " ".join(flags)
