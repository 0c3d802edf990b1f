"""Columns that a person names: the format that they describe, and what contradicts them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pairtune.config import Reading
from pairtune.data import judged_rows, labelled_rows, rated_rows
from pairtune.data.column_names import ITEM_SCORES, as_answers, as_flags, is_label, judged_columns
from pairtune.data.conversations import field_names, is_empty, is_transcript, one_line_of
from pairtune.data.formats import DESIRABLE, FORMATS, PROMPTS, Format, detect_format
from pairtune.data.judged_rows import Verdict
from pairtune.data.labels import learn_values, shown_values
from pairtune.data.pair_rows import Row
from pairtune.errors import BadInput

# Rows at the beginning of a source in which a named column has to occur at least once.
HEAD = 100

_PAIR_PARTS = ("prompt", "chosen", "rejected", "system")
_ITEM_TEXTS = ("text", "answer", "response", "content", "completion", "output")


def check_columns(reading: Reading, head: Sequence[Any], where: str) -> None:
    """Make sure that the named columns exist and can be what they are said to be.

    Raises:
        BadInput: a column is in none of the first rows, or `chosen` and `rejected` were named for a file that has a
            column of labels, and nobody confirmed them.
    """
    rows = [row for row in head if isinstance(row, Mapping)]
    if not rows:
        return
    for part, name in reading.columns.items():
        for column in columns_in(part, name):
            if not any(column in row for row in rows):
                raise BadInput(f"{where}: --column {part}={name}: there is no column {column}; {_present(rows)}")
    labels = [name for row in rows for name in row if is_label(name) and name not in reading.columns.values()]
    if {"chosen", "rejected"} & reading.columns.keys() and labels and not reading.confirmed:
        values = ", ".join(
            one_line_of(value, 20) for value in dict.fromkeys(str(row.get(labels[0])) for row in rows[:20])
        )
        raise BadInput(
            f"{where}: the column {labels[0]} (values {values}) may say which answer is better, row by row; if so, use "
            f"{as_flags(judged_columns(rows[0], str(labels[0])) | as_answers(reading.columns))}; if the better answer "
            f"is always in {reading.columns.get('chosen', 'chosen')}, add --yes"
        )


def check_codes(head: Sequence[Any], values: Callable[[str], Counter[str]], where: str) -> None:
    """Make sure that a label which is a code means what the format takes it for.

    Raises:
        BadInput: its values are not those of the format that the rows look like.
    """
    rows = (row for row in head if isinstance(row, Mapping))
    row, known = next(((row, found) for row in rows if (found := detect_format(row))), ({}, None))
    for field in known.codes if known else ():
        codes = values(field)
        if known and codes and not known.proof(codes):
            raise BadInput(
                f"{where}: the rows look like {known.name}, but the values of {field} are not its codes: "
                f"{shown_values(codes)}; say what they mean: {as_flags(judged_columns(row, field))} --label-a VALUE"
            )


def columns_in(part: str, name: str) -> list[str]:
    """The columns that one argument names: annotators may be several, label values and fields of items are none."""
    if part in ("label_a", "label_b", "scores"):
        return []
    return name.split(",") if part == "label" else [name]


def _present(rows: Sequence[Row]) -> str:
    return f"the rows have {field_names(dict.fromkeys(name for row in rows for name in row))}"


def format_of_columns(
    reading: Reading, head: Sequence[Any], values: Callable[[str], Counter[str]], where: str
) -> Format:
    """The format that a person's columns describe.

    Args:
        reading: the columns.
        head: the first rows.
        values: returns how often each value of a column occurs, for labels that have to be learned.
        where: the source, for messages.

    Raises:
        BadInput: the columns do not make a pair, or a label's values do not say which answer is better.
    """
    columns: Mapping[str, str] = {str(part): name for part, name in reading.columns.items()}
    asked = set(columns)
    row = _typical(columns, [row for row in head if isinstance(row, Mapping)])
    if "completion" in asked:
        return _single_format(columns, row, where)
    one_way = asked & {"chosen", "rejected"}, asked & {"score_a", "score_b"}, asked & {"label"}, asked & {"answers"}
    if sum(map(bool, one_way)) > 1:
        given = ", ".join(sorted(set().union(*one_way)))
        raise BadInput(f"{where}: {given} say which answer is better in different ways; name one of them")
    if "answers" in asked:
        return _rated_format(columns, row, where)
    if asked & {"label", "score_a", "score_b", "answer_a", "answer_b"}:
        return _judged_format(columns, row, values, reading.min_gap, where)
    return _pair_format(columns, row, where)


def _typical(columns: Mapping[str, str], rows: Sequence[Row]) -> Row:
    """The first row that has something in every named column."""
    named_columns = [column for part, name in columns.items() for column in columns_in(part, name)]
    full = (row for row in rows if all(not is_empty(row.get(column)) for column in named_columns))
    return next(full, rows[0] if rows else {})


def _pair_format(columns: Mapping[str, str], row: Row, where: str) -> Format:
    """The format that the rows have once the named columns are called prompt, chosen, rejected and system."""
    known = detect_format(_renamed(row, columns))
    if "prompt" not in columns and "prompt" not in row:
        beside = [name for name in row if str(name).strip().lower() in PROMPTS and name not in columns.values()]
        if beside and isinstance(row[beside[0]], str) and not is_transcript(row.get(columns.get("chosen", "chosen"))):
            raise BadInput(f"{where}: name the column of the prompt too, perhaps --column prompt={beside[0]}")
    if known is None:
        missing = [part for part in ("chosen", "rejected") if part not in columns and part not in row]
        if missing:
            raise BadInput(
                f"{where}: --column: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not named; give "
                "--column prompt=NAME --column chosen=NAME --column rejected=NAME, or for labelled answers "
                f"--label NAME --answer-a NAME --answer-b NAME; {_present([row])}"
            )
        known = next(each for each in FORMATS if each.name == "TRL standard")
    read = known.read
    used = {columns.get(key, key) for key in (*known.keys, *known.also)}
    better = columns.get("chosen", "chosen")
    return replace(
        known,
        keys=(),
        read=lambda row: read(_renamed(row, columns)),
        fits=lambda row: True,
        also=tuple(used | set(columns.values())),
        better=f"{better}, as --column says" if "chosen" in columns else known.better,
    )


def _renamed(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    """A row whose named columns have the names of the parts that they hold, beside those of the usual names."""
    usual = {part: row[part] for part in _PAIR_PARTS if part in row and part not in columns}
    return usual | {part: row[name] for part, name in columns.items() if name in row}


def _prompt_reader(columns: Mapping[str, str], row: Row, answer: str, where: str) -> tuple[Any, tuple[str, ...]]:
    """How the prompt is read, and the columns that this takes."""
    name = columns.get("prompt") or ("prompt" if "prompt" in row else "")
    if not name:
        if isinstance(row.get(answer), list) or is_transcript(row.get(answer)):
            return judged_rows.no_prompt, ()
        raise BadInput(f"{where}: --column prompt=NAME: name the column of the prompt; {_present([row])}")
    read, system = judged_rows.prompt_in(name), columns.get("system")
    if system is None:
        return read, (name,)
    return (lambda row: read({**row, "system": row.get(system)})), (name, system)


def _judged_format(
    columns: Mapping[str, str], row: Row, values: Callable[[str], Counter[str]], min_gap: float, where: str
) -> Format:
    a, b = columns.get("answer_a", ""), columns.get("answer_b", "")
    if not a or not b:
        raise BadInput(
            f"{where}: --answer-{'b' if a else 'a'}: name the columns of both answers, --answer-a NAME and "
            f"--answer-b NAME; {_present([row])}"
        )
    prompt, used = _prompt_reader(columns, row, a, where)
    if "label" in columns:
        labels = columns["label"].split(",")
        verdicts, why = learn_values(columns, _counted(labels, values), where)
        used = (*used, a, b, *labels)
        read = judged_rows.voted(prompt, a, b, _votes(labels, verdicts))
        return Format("labelled answers", (), read, prompt_field=used[0], also=used, better=why)
    scores = columns.get("score_a", ""), columns.get("score_b", "")
    if not all(scores):
        raise BadInput(
            f"{where}: name what says which answer is better: --label NAME, or --score-a NAME --score-b NAME; "
            f"{_present([row])}"
        )
    return Format(
        "scored answers",
        (),
        judged_rows.judged(prompt, a, b, judged_rows.by_scores(*scores, min_gap)),
        prompt_field=(used or (a,))[0],
        also=(*used, a, b, *scores),
        better=f"{a} where {scores[0]} is higher than {scores[1]}, {b} where it is lower; equal scores are a tie",
    )


def _single_format(columns: Mapping[str, str], row: Row, where: str) -> Format:
    """A single answer, and a label that says whether it is desirable."""
    if beside := sorted(columns.keys() - {"prompt", "system", "completion", "label"}):
        raise BadInput(f"{where}: --column completion={columns['completion']}: is a single answer; omit {beside[0]}")
    answer, label = columns["completion"], columns.get("label", "label")
    if label not in row:
        raise BadInput(f"{where}: --label NAME: name the column that says whether an answer is good; {_present([row])}")
    prompt, used = _prompt_reader(columns, row, answer, where)
    return Format(
        "labelled single answers",
        (),
        labelled_rows.completion(prompt, answer, label),
        prompt_field=(used or (answer,))[0],
        also=(*used, answer, label),
        better=DESIRABLE.format(label),
        single=True,
    )


def _counted(labels: Iterable[str], values: Callable[[str], Counter[str]]) -> Counter[str]:
    return sum((values(label) for label in labels), Counter())


def _votes(labels: Sequence[str], verdicts: Mapping[str, Verdict]) -> Callable[[Row], list[Verdict]]:
    """The votes in a row: one for each label column, or one for each item of a label that is a list."""

    def votes(row: Row) -> list[Verdict]:
        given = [
            (label, each)
            for label in labels
            for each in (row[label] if isinstance(row.get(label), list) else [row.get(label)])
            if not is_empty(each)
        ]
        read = judged_rows.by_value
        return [read(label, verdicts)({label: each}) for label, each in given]

    return votes


def _rated_format(columns: Mapping[str, str], row: Row, where: str) -> Format:
    """A list of rated answers: objects with a text and a score, or texts with a list of scores beside them."""
    answers, scores = columns["answers"], columns.get("scores")
    prompt, used = _prompt_reader(columns, row, "", where)
    listed = row.get(answers)
    item = listed[0] if isinstance(listed, list) and listed else None
    if isinstance(item, Mapping):
        text = next((name for name in _ITEM_TEXTS if isinstance(item.get(name), str)), None)
        score: str | None = scores if scores in item else next((name for name in ITEM_SCORES if name in item), None)
        if text is None or score is None or (scores and scores not in item):
            raise BadInput(
                f"{where}: --column answers={answers}: its items should have a text and a score; they have "
                f"{field_names(item)}; name the score with --column scores=NAME"
            )
        ranks = bool(re.search("rank|place|position", score, re.I))
        read = rated_rows.items(prompt, answers, text, score, ranks=ranks)
        better = f"of {answers}, the item whose {score} is {'lower, because it is a rank' if ranks else 'higher'}"
    elif scores and re.search("rank|place|position", scores, re.I):
        raise BadInput(f"{where}: --column scores={scores}: looks like ranks, of which the lowest is best; give scores")
    elif scores:
        read = rated_rows.parallel(prompt, answers, scores)
        better = f"of {answers}, the text whose value in {scores} is higher"
    else:
        raise BadInput(f"{where}: --column answers={answers}: name the column of the scores too: --column scores=NAME")
    return Format(
        "rated answers", (), read, prompt_field=used[0], also=(*used, answers, scores or answers), better=better
    )
