"""Rows with two answers and a judgement: a label, a winner, scores, or the votes of several annotators."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from pairtune.conversation import Message
from pairtune.data.conversations import (
    Parts,
    check_text,
    is_empty,
    is_transcript,
    kind_of,
    need,
    one_line_of,
    read_prompt,
    read_text,
    read_transcript,
    read_turns,
    split_answers,
    system_turn,
    user_turn,
)
from pairtune.data.pair_rows import as_turns, instruction
from pairtune.data.preference import BadRow, LeftOut

Row = Mapping[str, Any]
Verdict = Literal["a", "b", "tie"]
ReadVerdict = Callable[[Row], Verdict]

DISAGREE = "annotators disagree: the majority counts"

# Labels that name an answer, whatever the columns are called.
_NAMES: dict[str, Verdict] = {
    **dict.fromkeys(("a", "model_a", "response_a", "answer_a", "assistant_a", "left", "first", "a>b", "a>>b"), "a"),
    **dict.fromkeys(("b", "model_b", "response_b", "answer_b", "assistant_b", "right", "second", "b>a", "b>>a"), "b"),
    **dict.fromkeys(("tie", "tie (bothbad)", "both_bad", "bothbad", "both", "neither", "equal", "draw"), "tie"),
    **dict.fromkeys(("same", "a=b", "tie (inconsistent)", "a tie"), "tie"),
}


def label_key(value: Any) -> str:
    """A label for comparison: case, surrounding space, brackets and the type do not count; 1.0 is 1."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip().casefold().strip("[]'\" ")
    return text[:-2] if text.endswith(".0") and text[:-2].isdigit() else text


def named(value: Any, answers: tuple[str, str] = ("", "")) -> Verdict | None:
    """The verdict of a label that names an answer, by its column or in usual words; None if it does not."""
    key = label_key(value)
    columns: dict[str, Verdict] = {answers[0].casefold(): "a", answers[1].casefold(): "b"}
    return (columns.get(key) or _NAMES.get(key)) if key else None


def majority(votes: Sequence[Verdict]) -> tuple[Verdict, bool]:
    """The verdict of more than half of the votes, else a tie; and whether all votes are the same."""
    ((verdict, count),) = Counter(votes).most_common(1)
    return (verdict if 2 * count > len(votes) else "tie"), count == len(votes)


def judge(prompt: list[Message], answers: tuple[Any, Any], fields: tuple[str, str], verdict: Verdict) -> Parts:
    """The pair in a row with two answers, as texts, transcripts or turns.

    Raises:
        LeftOut: neither answer is preferred, or the conversations differ before the last answer.
        BadRow: an answer cannot be read.
    """
    if verdict == "tie":
        raise LeftOut("tie", "", "is a tie, so nothing is preferred")
    read = [_answer(value, field) for value, field in zip(answers, fields, strict=True)]
    if read[0][:-1] != read[1][:-1]:
        # Common in arenas: different first answers lead to different conversations; the vote is on no single answer.
        raise LeftOut(
            "conversations part before the last answer", fields[1], f"differs from {fields[0]} before its last turn"
        )
    better, worse = (0, 1) if verdict == "a" else (1, 0)
    return split_answers(prompt, read[better], read[worse], (fields[better], fields[worse]))


def _answer(value: Any, field: str) -> list[Message]:
    whole = is_transcript(value) and value.lstrip().startswith("Human:")  # an answer may begin with "Assistant:"
    return read_transcript(value, field) if whole else as_turns(value, field)


def judged(prompt: Callable[[Row], list[Message]], a: str, b: str, verdict: ReadVerdict) -> Callable[[Row], Parts]:
    """A reader of rows with the answers in the fields `a` and `b`."""

    def read(row: Row) -> Parts:
        return judge(prompt(row), (need(row, a), need(row, b)), (a, b), verdict(row))

    return read


def voted(
    prompt: Callable[[Row], list[Message]], a: str, b: str, votes: Callable[[Row], Sequence[Verdict]]
) -> Callable[[Row], Parts]:
    """A reader of rows with several annotators' votes: the verdict of more than half of them counts."""

    def read(row: Row) -> Parts:
        given = votes(row)
        if not given:
            raise LeftOut("no vote", "", "has no annotator's vote")
        verdict, unanimous = majority(given)
        if verdict == "tie" and not unanimous:
            raise LeftOut("no majority", "", "has no answer that more than half of the annotators prefer")
        parts = judge(prompt(row), (need(row, a), need(row, b)), (a, b), verdict)
        return parts if unanimous else parts._replace(note=DISAGREE)

    return read


_ANNOTATOR = re.compile(r"annotator\d+")


def pandalm_votes(row: Row) -> list[Verdict]:
    """PandaLM: a field for each annotator; 1 and 2 name an answer, 0 says that both are alike."""
    fields = [field for field in row if _ANNOTATOR.fullmatch(field) and not is_empty(row[field])]
    return [by_value(field, {"0": "tie", "1": "a", "2": "b"})(row) for field in fields]


# --- where the prompt is ---------------------------------------------------------------------------------------------


def prompt_in(field: str) -> Callable[[Row], list[Message]]:
    """The prompt in one field: text, a transcript or turns, after the row's system message."""
    return lambda row: system_turn(row) + read_prompt(need(row, field), field)


def no_prompt(row: Row) -> list[Message]:
    """Nothing: the answers are whole conversations."""
    return system_turn(row)


def pandalm_prompt(row: Row) -> list[Message]:
    """An alpaca prompt; PandaLM writes NaN for an empty input."""
    return instruction({**row, "input": row.get("input") if isinstance(row.get("input"), str) else ""})


def webgpt_prompt(row: Row) -> list[Message]:
    """The `full_text` of WebGPT's question."""
    question = need(row, "question")
    if not isinstance(question, Mapping):
        raise BadRow("question is not an object", "question", f"should be an object, but is {kind_of(question)}")
    return system_turn(row) + user_turn(read_text(question, "full_text"))


# --- who is better ---------------------------------------------------------------------------------------------------


def _need_label(row: Row, field: str) -> None:
    """Leave out a row that nobody has judged.

    Raises:
        LeftOut: its label is empty.
    """
    if is_empty(need(row, field)):
        raise LeftOut("no verdict", field, "is empty: nothing was judged")


def by_value(field: str, values: Mapping[str, Verdict]) -> ReadVerdict:
    """The verdict of a label with these values."""

    def verdict(row: Row) -> Verdict:
        _need_label(row, field)
        found = values.get(label_key(need(row, field)))
        if found is None:
            known = ", ".join(values)
            raise BadRow(
                "unknown label", field, f"should be one of {known}, but is {one_line_of(row[field]) or 'empty'}"
            )
        return found

    return verdict


def by_name(field: str, *answers: str) -> ReadVerdict:
    """The verdict of a label that names the better answer."""

    def verdict(row: Row) -> Verdict:
        _need_label(row, field)
        found = named(need(row, field), (answers[0], answers[1]) if answers else ("", ""))
        if found is None:
            raise BadRow(
                "unknown label", field, f"should name the better answer or a tie, but is {one_line_of(row[field])!r}"
            )
        return found

    return verdict


def by_sign(field: str) -> ReadVerdict:
    """The verdict of a signed strength: negative prefers the first answer, positive the second, 0 neither."""

    def verdict(row: Row) -> Verdict:
        strength = number(need(row, field), field)
        return "tie" if strength == 0 else "a" if strength < 0 else "b"

    return verdict


def by_scores(a: str, b: str, min_gap: float = 0.0) -> ReadVerdict:
    """The answer with the higher score; scores that are equal, or differ by less than `min_gap`, are a tie."""

    def verdict(row: Row) -> Verdict:
        ahead = number(need(row, a), a) - number(need(row, b), b)
        return "tie" if ahead == 0 or abs(ahead) < min_gap else "a" if ahead > 0 else "b"

    return verdict


def by_preference(field: str) -> ReadVerdict:
    """AlpacaFarm and AlpacaEval: 1 prefers the first answer, 2 the second; judges' means lie between, 1.5 is a tie."""

    def verdict(row: Row) -> Verdict:
        _need_label(row, field)  # the judge's answer could not be read
        preference = number(row[field], field)
        if preference in (0, 1.5):
            return "tie"
        if not 1 <= preference <= 2:
            raise BadRow("unknown label", field, f"should be 1 to 2, but is {preference:g}")
        return "a" if preference < 1.5 else "b"

    return verdict


def number(value: Any, field: str) -> float:
    """A field's finite number, also where it is written as text.

    Raises:
        BadRow: it is no number.
    """
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise BadRow(f"{field} is no number", field, f"should be a number, but is {one_line_of(value) or 'empty'}")
    return found


# --- formats that need more ------------------------------------------------------------------------------------------


def arena(row: Row) -> Parts:
    """Two conversations and the winner; `turn` is the number of questions after which MT-bench's were judged."""
    fields = ("conversation_a", "conversation_b")
    conversations = [read_turns(need(row, field), field) for field in fields]
    if not is_empty(row.get("turn")):
        questions = int(number(row["turn"], "turn"))
        conversations = [turns[: 2 * questions] for turns in conversations]
    return judge(system_turn(row), (conversations[0], conversations[1]), fields, by_name("winner")(row))


def arena_lists(row: Row) -> Parts:
    """Arena votes as a table: prompt and answers are JSON lists with a text for each turn, three columns the winner."""
    asked = _listed(need(row, "prompt"), "prompt")
    fields = ("response_a", "response_b")
    conversations = []
    for field in fields:
        replies = _listed(need(row, field), field)
        if len(replies) != len(asked):
            raise BadRow(
                "prompts and answers differ in number", field, f"has {len(replies)} texts for {len(asked)} prompts"
            )
        turns: list[Message] = []
        for question, reply in zip(asked, replies, strict=True):
            turns += user_turn(check_text(question, "prompt"))
            turns.append({"role": "assistant", "content": check_text(reply, field)})
        conversations.append(turns)
    return judge(system_turn(row), (conversations[0], conversations[1]), fields, _one_hot(row))


def _one_hot(row: Row) -> Verdict:
    columns: dict[str, Verdict] = {"winner_model_a": "a", "winner_model_b": "b", "winner_tie": "tie"}
    said = [verdict for field, verdict in columns.items() if number(need(row, field), field) == 1]
    if len(said) != 1:
        raise BadRow(
            "unknown winner", "winner_model_a", f"and its neighbours should hold a single 1, but hold {len(said)}"
        )
    return said[0]


def _listed(value: Any, field: str) -> list[Any]:
    """A JSON list in a text, as arena tables write them; other text is a list of one."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return [value]
    return value if isinstance(value, list) else [value]


def summaries(row: Row) -> Parts:
    """OpenAI's comparisons of summaries; `choice` counts from 0."""
    info, both = need(row, "info"), need(row, "summaries")
    if not isinstance(info, Mapping) or not isinstance(both, list) or len(both) != 2:
        raise BadRow("not two summaries", "summaries", "should be a list of two")
    field = next((name for name in ("post", "article") if not is_empty(info.get(name))), "post")
    texts = [read_text(each, "text") if isinstance(each, Mapping) else check_text(each, "summaries") for each in both]
    return judge(
        system_turn(row) + user_turn(read_text(info, field)),
        (texts[0], texts[1]),
        ("summaries", "summaries"),
        _CHOICE(row),
    )


_CHOICE = by_value("choice", {"0": "a", "1": "b"})
