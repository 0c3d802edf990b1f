"""Rows with one or several rated answers, and the rule that makes pairs of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from pairtune.config import Pairing
from pairtune.conversation import Message
from pairtune.data.conversations import (
    Parts,
    check_text,
    kind_of,
    need,
    need_list,
    read_prompt,
    read_text,
    system_turn,
    user_turn,
)
from pairtune.data.judged_rows import number
from pairtune.data.pair_rows import instruction
from pairtune.data.preference import BadRow, LeftOut

Row = Mapping[str, Any]


class Rated(NamedTuple):
    """A prompt and its answers with their scores; a higher score is better."""

    prompt: list[Message]
    answers: Sequence[str]
    scores: Sequence[float]


class RatedAnswer(NamedTuple):
    """One answer to a prompt with its score; the others are in the rows beside it."""

    prompt: list[Message]
    answer: str
    score: float


def pairs_of(rated: Rated, pairing: Pairing, min_gap: float) -> list[Parts]:
    """The pairs of a rated list: the best against the worst answer, or every two whose scores differ enough.

    Of equally good answers the first one counts as the best, of equally bad ones the last one as the worst.

    Args:
        rated: the answers.
        pairing: `best-worst` or `all`.
        min_gap: pairs whose scores differ by less are left out; equal scores never are a pair.

    Raises:
        LeftOut: no two scores differ enough.
    """
    order = sorted(range(len(rated.answers)), key=lambda at: -rated.scores[at])
    if len(order) < 2:
        raise LeftOut("a single answer", "", "has one answer, so nothing is preferred")
    sides = [(order[0], order[-1])] if pairing == "best-worst" else list(combinations(order, 2))
    apart = [(better, worse) for better, worse in sides if _apart(rated, better, worse, min_gap)]
    if not apart:
        raise LeftOut("tie", "", "has answers whose scores are equal, or differ by less than --min-gap")
    return [Parts(rated.prompt, rated.answers[better], rated.answers[worse]) for better, worse in apart]


def _apart(rated: Rated, better: int, worse: int, min_gap: float) -> bool:
    gap = rated.scores[better] - rated.scores[worse]
    return gap > 0 and gap >= min_gap and rated.answers[better] != rated.answers[worse]


def items(
    prompt: Callable[[Row], list[Message]], field: str, text: str, score: str, *, ranks: bool = False
) -> Callable[[Row], Rated]:
    """A reader of a list of objects, each with a text and a score, or a rank that is best when lowest."""

    def read(row: Row) -> Rated:
        listed = need_list(row, field)
        rated = []
        for place, item in enumerate(listed, 1):
            if not isinstance(item, Mapping):
                raise BadRow(
                    f"{field} are not objects", field, f"item {place} should be an object, but is {kind_of(item)}"
                )
            value = number(need(item, score), score)
            rated.append((check_text(need(item, text), text), -value if ranks else value))
        return Rated(prompt(row), [answer for answer, _ in rated], [value for _, value in rated])

    return read


def parallel(prompt: Callable[[Row], list[Message]], answers: str, scores: str) -> Callable[[Row], Rated]:
    """A reader of two lists: the texts, and their scores in the same order."""

    def read(row: Row) -> Rated:
        texts, values = need_list(row, answers), need_list(row, scores)
        if len(texts) != len(values):
            raise BadRow(
                "answers and scores differ in number", scores, f"has {len(values)} scores for {len(texts)} answers"
            )
        return Rated(
            prompt(row), [check_text(each, answers) for each in texts], [number(each, scores) for each in values]
        )

    return read


def scored(
    prompt: Callable[[Row], list[Message]], answers: tuple[str, str], scores: tuple[str, str]
) -> Callable[[Row], Rated]:
    """A reader of two texts with a score for each."""

    def read(row: Row) -> Rated:
        texts = [read_text(row, field) for field in answers]
        return Rated(prompt(row), texts, [number(need(row, field), field) for field in scores])

    return read


def helpsteer(row: Row) -> RatedAnswer:
    """HelpSteer: one answer a row; those to one prompt stand in neighbouring rows, and `helpfulness` rates them."""
    prompt = system_turn(row) + helpsteer_turns(need(row, "prompt"), "prompt")
    return RatedAnswer(prompt, read_text(row, "response"), number(need(row, "helpfulness"), "helpfulness"))


def helpsteer_turns(value: Any, field: str) -> list[Message]:
    """A prompt of several turns, which HelpSteer separates by `<extra_id_1>` and the name of the speaker."""
    if not (isinstance(value, str) and _SPEAKER.search(value)):
        return read_prompt(value, field)
    first, *rest = _SPEAKER.split(check_text(value, field))
    turns = [user_turn(check_text(first, field))[0]] if first.strip() else []
    for speaker, text in zip(rest[::2], rest[1::2], strict=True):
        if text.strip():  # a prompt may end with the header of the answer
            role = "user" if speaker == "User" else "assistant"
            turns.append({"role": role, "content": check_text(text, field)})
    return turns


_SPEAKER = re.compile(r"\n?<extra_id_1>(User|Assistant)\n?")


def code_ultrafeedback(row: Row) -> Rated:
    """CodeUltraFeedback: answers and ratings are in two lists, joined by the model's name."""
    ratings = {
        str(each.get("model")): number(each.get("rating"), "annotations")
        for each in need_list(row, "annotations")
        if isinstance(each, Mapping) and label_is_number(each.get("rating"))
    }
    answers = [
        (check_text(each.get("response"), "responses"), ratings[str(each.get("model"))])
        for each in need_list(row, "responses")
        if isinstance(each, Mapping) and str(each.get("model")) in ratings
    ]
    return Rated(instruction(row), [text for text, _ in answers], [score for _, score in answers])


def label_is_number(value: Any) -> bool:
    """Whether a rating is a number; raters may write N/A."""
    try:
        number(value, "rating")
    except BadRow:
        return False
    return True
