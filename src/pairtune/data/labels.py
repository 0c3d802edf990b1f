"""What the values of a label mean.

They are not guessed. A value that names an answer (its column, or A, model_b, left …) says which one it means, and so
do the numbers 1 and 2. Others, such as 0 and 1, mean either answer in one public file or another: a person has to say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from pairtune.data.column_names import side_of
from pairtune.data.conversations import one_line_of
from pairtune.data.judged_rows import Verdict, label_key, named
from pairtune.errors import BadInput, plural

_MOST_VALUES = 12


def learn_values(columns: Mapping[str, str], values: Counter[str], where: str) -> tuple[dict[str, Verdict], str]:
    """What each value of a label means, and in words why.

    The rules, in this order: values that a person named with `label_a` and `label_b` (if only one of them, the single
    other value means the other answer; further values are ties); values that name an answer or a tie; the numbers 1
    and 2.

    Raises:
        BadInput: the values do not say it; the message counts them and shows the flag.
    """
    a, b = columns["answer_a"], columns["answer_b"]
    means_a, means_b = _listed(columns.get("label_a")), _listed(columns.get("label_b"))
    said: dict[str, Verdict] = {**dict.fromkeys(means_a, "a"), **dict.fromkeys(means_b, "b")}
    if both := means_a & means_b:
        raise BadInput(
            f"{where}: --label-a and --label-b both have {', '.join(sorted(both))}; a value means one answer"
        )
    found = list(values)
    flag = f"{where}: --label {columns['label']}"
    if said:
        if unknown := [value for value in said if value not in found]:
            raise BadInput(f"{flag}: no row has the value {unknown[0]}; it has {shown_values(values)}")
        ties = {value for value in found if value not in said and named(value) == "tie"}
        rest = [value for value in found if value not in said and value not in ties]
        missing: Verdict | None = "b" if "b" not in said.values() else "a" if "a" not in said.values() else None
        if missing and len(rest) != 1:
            raise BadInput(
                f"{flag}: has {shown_values(values)}; say as well which value means answer {missing}, with "
                f"--label-{missing} VALUE"
            )
        learned = said | dict.fromkeys(rest, missing or "tie") | dict.fromkeys(ties, "tie")
        return learned, f"{_in_words(learned, a, b)}, as --label-{'a' if 'label_a' in columns else 'b'} says"
    swapped = side_of(a) == "b" and side_of(b) == "a"
    if swapped and not {label_key(a), label_key(b)} & set(found):
        raise BadInput(
            f"{flag}: {a} was named as the first answer, and {b} as the second, so {shown_values(values)} may mean "
            "either; name them the other way round, or say it with --label-a VALUE"
        )
    by_name = {value: verdict for value in found if (verdict := named(value, (a, b)))}
    if len(by_name) == len(found) and found:
        return by_name, f"{_in_words(by_name, a, b)}, which the values name"
    if set(found) == {"1", "2"}:
        numbers: dict[str, Verdict] = {"1": "a", "2": "b"}
        return numbers, f"{_in_words(numbers, a, b)}: the values number the two answers"
    raise BadInput(
        f"{flag}: has {shown_values(values)}, which do not say which answer is better; say which value means {a}: "
        f"--label-a VALUE (and --label-b VALUE, if a third one means a tie)"
    )


def _listed(text: str | None) -> set[str]:
    return {label_key(value) for value in (text or "").split(",") if value}


def shown_values(values: Counter[str]) -> str:
    """A label's values with the number of their rows, the most frequent ones first."""
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
