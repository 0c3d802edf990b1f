"""Rows that say outright which answer was chosen: how each format's prompt and two answers are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

from pairtune.conversation import Message
from pairtune.data.conversations import (
    Parts,
    check_text,
    is_empty,
    need,
    need_list,
    read_prompt,
    read_text,
    read_transcript,
    read_turns,
    split_answers,
    system_turn,
    user_turn,
)
from pairtune.data.preference import BadRow, LeftOut

Row = Mapping[str, Any]
ReadPair = Callable[[Row], Parts]

# Fields with the scores of the chosen and of the rejected answer.
SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_rating", "rejected_rating"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_avg_rating", "rejected_avg_rating"),
)
INVERTED = "chosen has a lower score than rejected"


def same_answers() -> BadRow:
    """The fault of a row whose two answers are equal."""
    return BadRow(
        "chosen equals rejected", "rejected", "is the same as chosen, so nothing is preferred; remove the row"
    )


def texts(prompt: str, chosen: str = "chosen", rejected: str = "rejected") -> ReadPair:
    """Three fields of text; the prompt may be an HH transcript, and a `system` column is used."""

    def read(row: Row) -> Parts:
        before = system_turn(row) + read_prompt(need(row, prompt), prompt)
        return Parts(before, read_text(row, chosen), read_text(row, rejected))

    return read


def turns(prompt: str | None, chosen: str = "chosen", rejected: str = "rejected") -> ReadPair:
    """Answers as turns or lists of turns, with or without the conversation before them; a text is one turn."""

    def read(row: Row) -> Parts:
        before = read_prompt(need(row, prompt), prompt) if prompt else []
        answers = as_turns(need(row, chosen), chosen), as_turns(need(row, rejected), rejected)
        return split_answers(system_turn(row) + before, *answers, (chosen, rejected))

    return read


def as_turns(value: Any, field: str) -> list[Message]:
    """An answer as turns: a text is an assistant's turn."""
    return (
        [{"role": "assistant", "content": check_text(value, field)}]
        if isinstance(value, str)
        else read_turns(value, field)
    )


def hh(row: Row) -> Parts:
    """Two HH transcripts."""
    chosen, rejected = (read_transcript(read_text(row, field), field) for field in ("chosen", "rejected"))
    return split_answers(system_turn(row), chosen, rejected, ("chosen", "rejected"))


def implicit_text(row: Row) -> Parts:
    """Two texts with a common beginning; the answers start at the word in which they first differ."""
    chosen, rejected = read_text(row, "chosen"), read_text(row, "rejected")
    if chosen == rejected:
        raise same_answers()
    shared = next(
        (at for at, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    while shared and not chosen[shared - 1].isspace():
        shared -= 1
    if not chosen[:shared].strip():
        raise BadRow(
            "no common prefix",
            "rejected",
            "has no beginning in common with chosen, so there is no prompt; give a prompt field",
        )
    prompt = system_turn(row) + user_turn(chosen[:shared].strip())
    return Parts(prompt, check_text(chosen[shared:], "chosen"), check_text(rejected[shared:], "rejected"))


def instruction(row: Row) -> list[Message]:
    """The prompt of alpaca rows: `instruction`, with `input` below it, after `system` and `history`."""
    text = read_text(row, "instruction")
    if not is_empty(row.get("input")):
        text += "\n" + check_text(row["input"], "input")  # LLaMA-Factory joins the two with a line break
    past: list[Message] = []
    history = [] if is_empty(row.get("history")) else need_list(row, "history")
    for number, turn in enumerate(history, 1):
        if not isinstance(turn, list) or len(turn) != 2:
            raise BadRow("history is not turns", "history", f"turn {number} should be [question, answer]")
        question, answer = (check_text(each, "history") for each in turn)
        past += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return system_turn(row) + past + user_turn(text)


def alpaca(chosen: str, rejected: str) -> ReadPair:
    """An alpaca prompt and two texts."""
    return lambda row: Parts(instruction(row), read_text(row, chosen), read_text(row, rejected))


def ms_swift(row: Row) -> Parts:
    """A conversation that ends with the chosen answer, and the rejected one beside it."""
    whole = read_turns(need(row, "messages"), "messages")
    if "rejected_messages" in row:
        rejected = read_turns(row["rejected_messages"], "rejected_messages")
        return split_answers(system_turn(row), whole, rejected, ("messages", "rejected_messages"))
    answer = need(row, "rejected_response")
    if isinstance(answer, list):
        if len(answer) != 1:
            fault = f"has {len(answer)} answers; write one row for each"
            raise BadRow("several rejected answers", "rejected_response", fault)
        (answer,) = answer
    rejected_turn: Message = {"role": "assistant", "content": check_text(answer, "rejected_response")}
    sides = whole, [*whole[:-1], rejected_turn]
    return split_answers(system_turn(row), *sides, ("messages", "rejected_response"))


def openai(row: Row) -> Parts:
    """OpenAI's preference format."""
    request = need(row, "input")
    if not isinstance(request, Mapping) or "messages" not in request:
        raise BadRow("no messages", "input", "should be an object with messages")
    fields = ("preferred_output", "non_preferred_output")
    preferred, other = (read_turns(need(row, field), field) for field in fields)
    return split_answers(system_turn(row) + read_turns(request["messages"], "input"), preferred, other, fields)


def answer_lists(row: Row) -> list[Parts]:
    """Lists of chosen and rejected answers: RM-Bench's, of which those at the same place are of one style, else all."""
    prompt = system_turn(row) + read_prompt(need(row, "prompt"), "prompt")
    better, worse = need_list(row, "chosen"), need_list(row, "rejected")
    sides = zip(better, worse, strict=True) if len(better) == len(worse) else product(better, worse)
    return [Parts(prompt, check_text(good, "chosen"), check_text(bad, "rejected")) for good, bad in sides]


def check_scores(row: Row) -> str:
    """What to count of a row with scores for chosen and rejected; empty if they say what the names say.

    Raises:
        LeftOut: the scores are equal, so the choice of "chosen" is arbitrary, or the row says that it is a tie.
    """
    if row.get("status") == "tie":  # of distilabel's orca pairs
        raise LeftOut("tie", "status", "is tie, so nothing is preferred")
    for better, worse in SCORES:
        scores = row.get(better), row.get(worse)
        if None in scores:
            continue
        if scores[0] == scores[1]:
            raise LeftOut("tie", worse, f"is the same as {better}, so nothing is preferred")
        if all(isinstance(score, int | float) for score in scores) and scores[0] < scores[1]:  # type: ignore[operator]
            return INVERTED
    return ""
