"""From one row of a file to a preference pair: the formats, detected by their keys.

Each format is one entry of `FORMATS`: a name, the keys that its rows have, and how its prompt and answers are read.
The first entry that fits is used, so formats with rarer keys come first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pairtune.config import Columns
from pairtune.conversation import Message
from pairtune.data.conversations import (
    check_prompt,
    check_text,
    field_names,
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
from pairtune.data.preference import BadRow, LeftOut, PreferencePair

# Prompt, chosen, rejected.
Parts = tuple[list[Message], str, str]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """A shape of rows.

    Attributes:
        name: as shown to the user and written to `data.json`.
        keys: the keys that every row of this format has.
        read: returns the prompt, chosen and rejected of a row.
        fits: a further check, for formats that the keys alone do not identify.
        prompt_field: the field to name in messages about the prompt.
    """

    name: str
    keys: tuple[str, ...]
    read: Callable[[Row], Parts]
    fits: Callable[[Row], bool] = lambda row: True
    prompt_field: str = "prompt"

    def has_keys(self, row: Row) -> bool:
        """Whether a row has this format's keys."""
        return all(key in row for key in self.keys)


def detect_format(row: Row) -> Format | None:
    """The format of a row, by its keys and the types of their values."""
    return next((known for known in FORMATS if known.has_keys(row) and known.fits(row)), None)


class RowParser:
    """Turns the rows of one source into pairs; the first pair sets the source's format.

    Args:
        columns: the names of the fields that hold `prompt`, `chosen`, `rejected` and `system`. The format is then
            detected from the content of these fields.
    """

    def __init__(self, columns: Columns | None = None) -> None:
        self.columns = columns or {}
        self.format: Format | None = None

    def parse(self, row: Any, origin: str) -> PreferencePair:
        """Convert a row to a pair.

        Raises:
            BadRow: the row is not a pair, is in a different format than earlier rows, or its parts cannot be used.
            LeftOut: the row is valid, but expresses no preference between two answers.
        """
        if isinstance(row, BadRow):
            raise row
        if not isinstance(row, Mapping):
            raise BadRow("not an object", "", f"should be an object with fields, but is {kind_of(row)}")
        if self.columns:
            row = {str(part): row[name] for part, name in self.columns.items() if name in row}
        known = self._format_of(row)
        prompt, chosen, rejected = known.read(row)
        check_prompt(prompt, known.prompt_field)
        if chosen == rejected:
            raise _same_answers()
        self.format = known
        return PreferencePair(tuple(prompt), chosen, rejected, origin)

    def _format_of(self, row: Row) -> Format:
        """The format to read a row with; if none fits, the one whose reader will name the faulty field."""
        found = detect_format(row)
        if self.format is None:
            return found or _nearest(row)
        if found in (None, self.format) or set(found.keys) < set(self.format.keys):
            return self.format
        raise BadRow("mixed formats", "", f"is in the format {found.name}, but earlier rows are in {self.format.name}")


def _nearest(row: Row) -> Format:
    candidates = [known for known in FORMATS if known.has_keys(row)]
    if not candidates:
        raise _unknown(row)
    most = max(len(known.keys) for known in candidates)
    return [known for known in candidates if len(known.keys) == most][-1]


def parse_row(row: Any, origin: str) -> PreferencePair:
    """Convert a single row to a pair; see `RowParser.parse`."""
    return RowParser().parse(row, origin)


def _same_answers() -> BadRow:
    return BadRow(
        "chosen equals rejected", "rejected", "is the same as chosen, so nothing is preferred; remove the row"
    )


def _unknown(row: Row) -> BadRow:
    present = field_names(row)
    if {"completion", "label"} <= row.keys():
        return BadRow("not a pair", "", "has one answer with a label (KTO's format); give two answers per row")
    missing = [name for name in ("chosen", "rejected") if name not in row]
    if len(missing) == 1:
        return BadRow(f"no {missing[0]}", missing[0], f"is missing; the row has {present}")
    return BadRow(
        "unknown format", "", f"is in no known format; it has {present}. Name the columns: --column chosen=NAME …"
    )


# --- how the parts of each format are read ---------------------------------------------------------------------------


def _texts(prompt: str, chosen: str = "chosen", rejected: str = "rejected") -> Callable[[Row], Parts]:
    """Three fields of text; the prompt may be an HH transcript, and a `system` column is used."""

    def read(row: Row) -> Parts:
        return (
            system_turn(row) + read_prompt(need(row, prompt), prompt),
            read_text(row, chosen),
            read_text(row, rejected),
        )

    return read


def _turns(prompt: str | None, chosen: str = "chosen", rejected: str = "rejected") -> Callable[[Row], Parts]:
    """Answers as lists of turns, with or without the conversation before them."""

    def read(row: Row) -> Parts:
        before = read_prompt(need(row, prompt), prompt) if prompt else []
        answers = read_turns(need(row, chosen), chosen), read_turns(need(row, rejected), rejected)
        return split_answers(system_turn(row) + before, *answers, (chosen, rejected))

    return read


def _hh(row: Row) -> Parts:
    chosen, rejected = (read_transcript(read_text(row, field), field) for field in ("chosen", "rejected"))
    return split_answers([], chosen, rejected, ("chosen", "rejected"))


def _implicit_text(row: Row) -> Parts:
    """Two texts with a common beginning; the answers start at the word in which they first differ."""
    chosen, rejected = read_text(row, "chosen"), read_text(row, "rejected")
    if chosen == rejected:
        raise _same_answers()
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
    answers = (check_text(text[shared:], field) for text, field in ((chosen, "chosen"), (rejected, "rejected")))
    return (user_turn(chosen[:shared].strip()), *answers)  # type: ignore[return-value]


def _alpaca(chosen: str, rejected: str) -> Callable[[Row], Parts]:
    def read(row: Row) -> Parts:
        text = read_text(row, "instruction")
        if isinstance(row.get("input"), str) and row["input"].strip():
            text += "\n" + check_text(row["input"], "input")  # LLaMA-Factory joins the two with a line break
        past: list[Message] = []
        for number, turn in enumerate(row.get("history") or [], 1):
            if not isinstance(turn, list) or len(turn) != 2:
                raise BadRow("history is not turns", "history", f"turn {number} should be [question, answer]")
            question, answer = (check_text(each, "history") for each in turn)
            past += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        prompt = system_turn(row) + past + user_turn(text)
        return prompt, read_text(row, chosen), read_text(row, rejected)

    return read


_REJECTED = {"rejected_response", "rejected_messages"}


def _ms_swift(row: Row) -> Parts:
    whole = read_turns(need(row, "messages"), "messages")
    if "rejected_messages" in row:
        rejected = read_turns(row["rejected_messages"], "rejected_messages")
        return split_answers([], whole, rejected, ("messages", "rejected_messages"))
    answer = need(row, "rejected_response")
    if isinstance(answer, list):
        if len(answer) != 1:
            fault = f"has {len(answer)} answers; write one row for each"
            raise BadRow("several rejected answers", "rejected_response", fault)
        (answer,) = answer
    rejected_turn: Message = {"role": "assistant", "content": check_text(answer, "rejected_response")}
    return split_answers([], whole, [*whole[:-1], rejected_turn], ("messages", "rejected_response"))


def _openai(row: Row) -> Parts:
    request = need(row, "input")
    if not isinstance(request, Mapping) or "messages" not in request:
        raise BadRow("no messages", "input", "should be an object with messages")
    if request.get("tools"):
        raise BadRow("tool calls", "input", "names tools, which are not supported")
    fields = ("preferred_output", "non_preferred_output")
    preferred, other = (read_turns(need(row, field), field) for field in fields)
    return split_answers(read_turns(request["messages"], "input"), preferred, other, fields)


def _shp(row: Row) -> Parts:
    answers = read_text(row, "human_ref_A"), read_text(row, "human_ref_B")
    label = str(need(row, "labels")).strip()
    if label not in ("0", "1"):
        raise BadRow("unknown label", "labels", f"should be 1 (A is preferred) or 0, but is {one_line_of(label)}")
    chosen, rejected = answers if label == "1" else answers[::-1]
    return user_turn(read_text(row, "history")), chosen, rejected


def _arena(row: Row) -> Parts:
    winner = need(row, "winner")
    if isinstance(winner, str) and ("tie" in winner.lower() or "both" in winner.lower()):
        raise LeftOut("tie", "winner", "is a tie, so nothing is preferred")
    order = {"model_a": ("conversation_a", "conversation_b"), "model_b": ("conversation_b", "conversation_a")}
    if not isinstance(winner, str) or winner not in order:
        raise BadRow("unknown winner", "winner", f"should be model_a, model_b or a tie, but is {one_line_of(winner)}")
    fields = order[winner]
    chosen, rejected = (read_turns(need(row, field), field) for field in fields)
    if chosen[:-1] != rejected[:-1]:
        # Common in arenas: different first answers lead to different conversations; the vote is on no single answer.
        raise LeftOut(
            "conversations part before the last answer", fields[1], f"differs from {fields[0]} before its last turn"
        )
    return split_answers([], chosen, rejected, fields)


_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
)


def _untied(read: Callable[[Row], Parts]) -> Callable[[Row], Parts]:
    """A reader for formats with scores; equal scores are a tie, in which the choice of "chosen" is arbitrary."""

    def checked(row: Row) -> Parts:
        for better, worse in _SCORES:
            if row.get(better) is not None and row.get(better) == row.get(worse):
                raise LeftOut("tie", worse, f"is the same as {better}, so nothing is preferred")
        return read(row)

    return checked


def _listed(*fields: str) -> Callable[[Row], bool]:
    return lambda row: all(isinstance(row[field], list | Mapping) for field in fields)


def _scored(row: Row) -> bool:
    return _listed("chosen", "rejected")(row) and any(better in row for better, _ in _SCORES)


def _pair_of_texts(row: Row) -> bool:
    return isinstance(row["chosen"], str) and isinstance(row["rejected"], str)


_PAIR = ("chosen", "rejected")
_RESPONSES = ("chosen_response", "rejected_response")
_listed_pair = _listed(*_PAIR)

FORMATS: tuple[Format, ...] = (
    Format("OpenAI", ("input", "preferred_output", "non_preferred_output"), _openai, prompt_field="input"),
    Format("arena", ("conversation_a", "conversation_b", "winner"), _arena, prompt_field="conversation_a"),
    Format("SHP", ("history", "human_ref_A", "human_ref_B", "labels"), _shp, prompt_field="history"),
    Format("ms-swift", ("messages",), _ms_swift, lambda row: bool(_REJECTED & row.keys()), "messages"),
    Format("ShareGPT", ("conversations", *_PAIR), _turns("conversations"), prompt_field="conversations"),
    Format("UltraFeedback", ("prompt", *_PAIR), _untied(_turns("prompt")), _scored),
    Format("TRL conversational", ("prompt", *_PAIR), _turns("prompt"), _listed_pair),
    Format("Axolotl", ("messages", *_PAIR), _turns("messages"), _listed_pair, "messages"),
    Format("rm-static", ("prompt", "response", *_PAIR), _texts("prompt"), _pair_of_texts),
    Format("TRL standard", ("prompt", *_PAIR), _untied(_texts("prompt")), _pair_of_texts),
    Format("orca", ("question", *_PAIR), _texts("question"), prompt_field="question"),
    Format("orca", ("system", "input", *_PAIR), _texts("input"), prompt_field="input"),
    Format("Argilla", ("instruction", *_RESPONSES), _untied(_alpaca(*_RESPONSES)), prompt_field="instruction"),
    Format("H2O", ("prompt", *_RESPONSES), _texts("prompt", *_RESPONSES)),
    Format("alpaca", ("instruction", *_PAIR), _alpaca(*_PAIR), prompt_field="instruction"),
    Format("TRL conversational, implicit prompt", _PAIR, _turns(None), _listed_pair, "chosen"),
    Format("HH transcripts", _PAIR, _hh, lambda row: is_transcript(row["chosen"]), "chosen"),
    Format("TRL standard, implicit prompt", _PAIR, _implicit_text, _pair_of_texts, "chosen"),
)
