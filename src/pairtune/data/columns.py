"""Columns that a person names: what they hold, which answer is the better one, and what to name if nothing fits.

Labels are not guessed. A value that names an answer (its column, or A, model_b, left …) says which one it means, and so
do the numbers 1 and 2. Others, such as 0 and 1, mean either answer in one public file or another: a person has to say.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from typing import Any

from pairtune.config import Reading
from pairtune.data import judged_rows, rated_rows
from pairtune.data.conversations import field_names, is_empty, is_transcript, one_line_of
from pairtune.data.formats import FORMATS, PROMPTS, Format, detect_format
from pairtune.data.judged_rows import Verdict, label_key, named
from pairtune.data.pair_rows import Row
from pairtune.data.preference import BadRow
from pairtune.errors import BadInput, plural

# Rows at the beginning of a source in which a named column has to occur at least once.
HEAD = 100
_MOST_VALUES = 12

_PAIR_PARTS = ("prompt", "chosen", "rejected", "system")
_ITEM_TEXTS = ("text", "answer", "response", "content", "completion", "output")
_ITEM_SCORES = ("score", "rating", "overall_score", "reward", "rank")

# Columns that may say which of two answers is better, in lower case with underscores; used to warn and to propose a
# command, never to label.
_LABELS = re.compile(
    r"(^|_)(labels?|winner|preference|preferred|choice|better|best|verdict|votes?|judge?ment|which|annotator|gold)(_|$)"
)
_FIRST = re.compile(r"(?:^|[_ ]|(?<=[a-z]))(a|1|0|first|left)$", re.I)
_SECONDS = {"a": "b", "1": "2", "0": "1", "first": "second", "left": "right"}
_PROMPTS = ("prompt", "instruction", "question", "input", "inputs", "query", "context", "history", "post", "ask")
_BETTER = ("chosen", "preferred", "accepted", "good", "better", "positive", "win", "pos")
_WORSE = ("rejected", "dispreferred", "refused", "bad", "worse", "negative", "lose", "neg")


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
        for column in _columns_in(part, name):
            if not any(column in row for row in rows):
                raise BadInput(f"{where}: --column {part}={name}: there is no column {column}; {_present(rows)}")
    labels = [name for row in rows for name in row if is_label(name) and name not in reading.columns.values()]
    if {"chosen", "rejected"} & reading.columns.keys() and labels and not reading.confirmed:
        values = ", ".join(
            one_line_of(value, 20) for value in dict.fromkeys(str(row.get(labels[0])) for row in rows[:20])
        )
        raise BadInput(
            f"{where}: the column {labels[0]} (values {values}) may say which answer is better, row by row; if so, use "
            f"{_flags(_judged_columns(rows[0], str(labels[0])) | _as_answers(reading.columns))}; if the better answer "
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
                f"{_shown(codes)}; say what they mean: {_flags(_judged_columns(row, field))} --label-a VALUE"
            )


def _columns_in(part: str, name: str) -> list[str]:
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
    named_columns = [column for part, name in columns.items() for column in _columns_in(part, name)]
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


def _counted(labels: Iterable[str], values: Callable[[str], Counter[str]]) -> Counter[str]:
    return sum((values(label) for label in labels), Counter())


def _votes(labels: Sequence[str], verdicts: Mapping[str, Verdict]) -> Callable[[Row], list[Verdict]]:
    """The votes in a row: one for each label column, or one for each item of a label that is a list."""

    def votes(row: Row) -> list[Verdict]:
        given = [
            (label, each)
            for label in labels
            for each in (row[label] if isinstance(row.get(label), list) else [row.get(label)])
            if not is_empty(each) and each == each  # noqa: PLR0124 - NaN is no vote
        ]
        read = judged_rows.by_value
        return [read(label, verdicts)({label: each}) for label, each in given]

    return votes


def learn_values(columns: Mapping[str, str], values: Counter[str], where: str) -> tuple[dict[str, Verdict], str]:
    """What each value of a label means, and in words why.

    The rules, in this order: values that a person named with `label_a` and `label_b` (if only one of them, the single
    other value means the other answer; further values are ties); values that name an answer or a tie; the numbers 1
    and 2.

    Raises:
        BadInput: the values do not say it; the message counts them and shows the flag.
    """
    a, b = columns["answer_a"], columns["answer_b"]
    said: dict[str, Verdict] = {
        **{label_key(value): "a" for value in columns.get("label_a", "").split(",") if value},
        **{label_key(value): "b" for value in columns.get("label_b", "").split(",") if value},
    }
    if both := {label for label in said if label in _listed(columns.get("label_a"))} & _listed(columns.get("label_b")):
        raise BadInput(
            f"{where}: --label-a and --label-b both have {', '.join(sorted(both))}; a value means one answer"
        )
    found = list(values)
    flag = f"{where}: --label {columns['label']}"
    if said:
        if unknown := [value for value in said if value not in found]:
            raise BadInput(f"{flag}: no row has the value {unknown[0]}; it has {_shown(values)}")
        ties = {value for value in found if value not in said and named(value) == "tie"}
        rest = [value for value in found if value not in said and value not in ties]
        missing: Verdict | None = "b" if "b" not in said.values() else "a" if "a" not in said.values() else None
        if missing and len(rest) != 1:
            raise BadInput(
                f"{flag}: has {_shown(values)}; say as well which value means answer {missing}, with "
                f"--label-{missing} VALUE"
            )
        learned = said | dict.fromkeys(rest, missing or "tie") | dict.fromkeys(ties, "tie")
        return learned, f"{_in_words(learned, a, b)}, as --label-{'a' if 'label_a' in columns else 'b'} says"
    swapped = _side(a) == "b" and _side(b) == "a"
    if swapped and not {label_key(a), label_key(b)} & set(found):
        raise BadInput(
            f"{flag}: {a} was named as the first answer, and {b} as the second, so {_shown(values)} may mean either; "
            "name them the other way round, or say it with --label-a VALUE"
        )
    by_name = {value: verdict for value in found if (verdict := named(value, (a, b)))}
    if len(by_name) == len(found) and found:
        return by_name, f"{_in_words(by_name, a, b)}, which the values name"
    if set(found) == {"1", "2"}:
        numbers: dict[str, Verdict] = {"1": "a", "2": "b"}
        return numbers, f"{_in_words(numbers, a, b)}: the values number the two answers"
    raise BadInput(
        f"{flag}: has {_shown(values)}, which do not say which answer is better; say which value means {a}: "
        f"--label-a VALUE (and --label-b VALUE, if a third one means a tie)"
    )


def _listed(text: str | None) -> set[str]:
    return {label_key(value) for value in (text or "").split(",") if value}


def _side(column: str) -> Verdict | None:
    """Which answer a column's name says it is, by its last part: response_b, answer2, right."""
    ending = _FIRST.search(column)
    if ending:
        return "a"
    other = re.search(r"(?:^|[_ ]|(?<=[a-z]))(b|2|second|right)$|^(right)_", column, re.I)
    return "b" if other else "a" if re.match("left_", column, re.I) else None


def _shown(values: Counter[str]) -> str:
    listed = ", ".join(
        f"{one_line_of(value, 20)} ({plural(rows, 'row')})" for value, rows in values.most_common(_MOST_VALUES)
    )
    return (listed or "no values") + (", …" if len(values) > _MOST_VALUES else "")


def _in_words(verdicts: Mapping[str, Verdict], a: str, b: str) -> str:
    words = []
    for verdict, column in (("a", a), ("b", b)):
        meant = " or ".join(value for value, each in verdicts.items() if each == verdict)
        words.append(f"{column} where the label is {meant}" if meant else f"never {column}")
    return ", ".join(words)


def _rated_format(columns: Mapping[str, str], row: Row, where: str) -> Format:
    """A list of rated answers: objects with a text and a score, or texts with a list of scores beside them."""
    answers, scores = columns["answers"], columns.get("scores")
    prompt, used = _prompt_reader(columns, row, "", where)
    listed = row.get(answers)
    item = listed[0] if isinstance(listed, list) and listed else None
    if isinstance(item, Mapping):
        text = next((name for name in _ITEM_TEXTS if isinstance(item.get(name), str)), None)
        score: str | None = scores if scores in item else next((name for name in _ITEM_SCORES if name in item), None)
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


# --- what to say of rows in no known format --------------------------------------------------------------------------


def unknown_format(row: Row, source: str) -> BadRow:
    """The fault of a row in no known format, with the three nearest ones and a command that would read it."""
    nearest = ", ".join(_nearest(row))
    return BadRow(
        "unknown format",
        "",
        f"is in no known format; it has {field_names(row)}. Nearest are {nearest}. If it is another format, name the "
        f"columns: pairtune data inspect {shlex.quote(source)} {_flags(_proposed(row))}",
    )


def unpaired(row: Row) -> BadRow | None:
    """The fault of rows with a single answer and a thumb: KTO's format, in the spellings of TRL and LLaMA-Factory."""
    thumbs = {"true", "false", "0", "1", "desirable", "undesirable"}
    labels = [name for name in ("label", "kto_tag") if label_key(row.get(name)) in thumbs]
    single = {"completion", "messages", "output", "response"} & row.keys()
    if labels and single and not ({"chosen", "rejected", "rejected_response", "rejected_messages"} & row.keys()):
        return BadRow("not a pair", "", "has one answer with a label (KTO's format); give two answers per row")
    return None


def _nearest(row: Row) -> list[str]:
    """The three formats that share most with a row's keys, each with the keys that it needs."""

    def likeness(known: Format) -> float:
        best = (max(SequenceMatcher(None, key, str(name)).ratio() for name in row) for key in known.keys) if row else ()
        return sum(best) / len(known.keys)

    ranked = sorted(FORMATS, key=likeness, reverse=True)
    names = dict.fromkeys(f"{known.name} ({', '.join(known.keys)})" for known in ranked)
    return list(names)[:3]


def _proposed(row: Row) -> dict[str, str]:
    """The columns that a row seems to have, by their names."""
    if labels := [str(name) for name in row if is_label(name)]:
        return _judged_columns(row, labels[0])
    first, second = _two_answers(row)
    scores = [str(name) for name in row if re.search("score|rating|reward", str(name), re.I)]
    of_first, of_second = ([name for name in scores if _side(name) == side] for side in ("a", "b"))
    if first and len(of_first) == len(of_second) == 1:
        pair = {"answer_a": first, "answer_b": second, "score_a": of_first[0], "score_b": of_second[0]}
        return {"prompt": _like(row, _PROMPTS), **pair}
    for name, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping) and set(_ITEM_SCORES) & value[0].keys():
            return {"prompt": _like(row, _PROMPTS), "answers": str(name)}
    return {"prompt": _like(row, _PROMPTS), "chosen": _like(row, _BETTER), "rejected": _like(row, _WORSE)}


def _judged_columns(row: Row, label: str) -> dict[str, str]:
    first, second = _two_answers(row)
    return {
        "prompt": _like(row, _PROMPTS),
        "label": label,
        "answer_a": first or "NAME",
        "answer_b": second or "NAME",
    }


def _as_answers(columns: Mapping[Any, str]) -> dict[str, str]:
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


def _flags(columns: Mapping[str, str]) -> str:
    """The columns as command-line flags."""
    flags = []
    for part, name in columns.items():
        if part == "prompt" and name == "prompt":
            continue
        short = f"--{part.replace('_', '-')} {shlex.quote(name)}"
        flags.append(short if part in _SHORT else f"--column {part}={shlex.quote(name)}")
    return " ".join(flags)
