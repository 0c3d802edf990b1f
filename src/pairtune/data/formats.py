"""The formats of preference rows, told apart by their keys.

Each format is one entry of `FORMATS`: a name, the keys that its rows have, and how its prompt and answers are read.
The first entry that fits is used, so formats with rarer keys come first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pairtune.conversation import Message
from pairtune.data import judged_rows, labelled_rows, pair_rows, rated_rows
from pairtune.data.conversations import SYSTEM_FIELDS, Parts, is_transcript, need, system_turn
from pairtune.data.judged_rows import by_name, by_preference, by_sign, by_value, judged, prompt_in
from pairtune.data.pair_rows import Row, alpaca, texts, turns
from pairtune.data.preference import BadRow
from pairtune.data.rated_rows import Rated, RatedAnswer

# What a row gives: a pair, several, or rated answers that pairs are made of.
Content = Parts | list[Parts] | list[Parts | BadRow] | Rated | RatedAnswer


@dataclass(frozen=True)
class Format:
    """A shape of rows.

    Attributes:
        name: as shown to the user and written to `data.json`.
        keys: the keys that every row of this format has.
        read: returns what a row gives.
        fits: a further check, for formats that the keys alone do not identify.
        prompt_field: the field to name in messages about the prompt.
        also: keys that are read where a row has them.
        better: which answer is taken for the better one, and why.
        strict: whether rows that have the keys but do not fit are in another format, not faulty rows of this one.
        codes: fields whose values are codes, which other files use otherwise.
        proof: whether the values that occur in a source show that it uses the codes as this format does.
        single: whether rows have single answers, each desirable or not, for unpaired losses.
    """

    name: str
    keys: tuple[str, ...]
    read: Callable[[Row], Content]
    fits: Callable[[Row], bool] = lambda row: True
    prompt_field: str = "prompt"
    also: tuple[str, ...] = ()
    better: str = "chosen, as its name says"
    strict: bool = False
    codes: tuple[str, ...] = ()
    proof: Callable[[Collection[str]], bool] = lambda values: True
    single: bool = False

    def uses(self, field: str) -> bool:
        """Whether a field of a row is read."""
        return field in self.keys or field in self.also or field in _ALWAYS


# Read in every format: the system message, the tools, and what says that a pair is a tie.
_ALWAYS = (*SYSTEM_FIELDS, "tools", "status", *(field for pair in pair_rows.SCORES for field in pair))


def detect_format(row: Row) -> Format | None:
    """The format of a row, by its keys and the types of their values."""
    return next((known for known in formats_with(tuple(row)) if known.fits(row)), None)


@lru_cache(maxsize=1024)
def formats_with(keys: tuple[Any, ...]) -> tuple[Format, ...]:
    """The formats whose keys are all among these."""
    present = set(keys)
    return tuple(known for known in FORMATS if present.issuperset(known.keys))


def _listed(*fields: str) -> Callable[[Row], bool]:
    return lambda row: all(isinstance(row[field], list | Mapping) for field in fields)


def _scored(row: Row) -> bool:
    return _listed_pair(row) and any(better in row for better, _ in pair_rows.SCORES)


def _pair_of_texts(row: Row) -> bool:
    return isinstance(row["chosen"], str) and isinstance(row["rejected"], str)


def has_prompt_column(row: Row) -> bool:
    """Whether a column is called as those are that hold a prompt."""
    return any(str(name).strip().lower() in PROMPTS for name in row)


def _no_prompt_column(row: Row) -> bool:
    return _pair_of_texts(row) and not has_prompt_column(row)


def _lists_of_texts(row: Row) -> bool:
    return all(
        isinstance(row[side], list) and row[side] and all(isinstance(text, str) for text in row[side]) for side in PAIR
    )


def _ranked(row: Row) -> bool:
    return _items_with("answers", "rank")(row)


def _items_with(field: str, key: str) -> Callable[[Row], bool]:
    def fits(row: Row) -> bool:
        value: Any = row[field]
        return isinstance(value, list) and all(isinstance(item, Mapping) and key in item for item in value)

    return fits


def _numbered(found: Collection[str]) -> bool:
    """Whether labels count the answers from 1, not from 0."""
    return "2" in found and set(found) <= {"1", "2"}


def _with_two(found: Collection[str]) -> bool:
    return "2" in found


def _with_zero(found: Collection[str]) -> bool:
    return "0" in found


def _signed(found: Collection[str]) -> bool:
    """Whether strengths have a sign, and are not a scale from 1."""
    return any(_number(value) < 0 for value in found)


def _above_one(found: Collection[str]) -> bool:
    return any(_number(value) > 1 for value in found)


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return 0.0


def _helpsteer_prompt(row: Row) -> list[Message]:
    return system_turn(row) + rated_rows.helpsteer_turns(need(row, "prompt"), "prompt")


PAIR = ("chosen", "rejected")
_RESPONSES = ("chosen_response", "rejected_response")
_listed_pair = _listed(*PAIR)
# Names of columns that hold a prompt; beside such a column, two answers' common beginning is no prompt.
PROMPTS = ("prompt", "instruction", "question", "input", "inputs", "query", "context", "history", "post")
_RATINGS = ("ratings", "rating")

DESIRABLE = "an answer is desirable where {} is true or 1, undesirable where it is false, 0 or -1"


def _labelled(
    name: str, keys: tuple[str, ...], read: Callable[[Row], Parts], prompt: str, also: tuple[str, ...] = ()
) -> Format:
    label = keys[-1]
    fits, better = labelled_rows.has_thumb(label), DESIRABLE.format(label)
    return Format(name, keys, read, fits, prompt, also, better, strict=True, single=True)


def _labelled_formats(label: str) -> Iterator[Format]:
    """Single answers as TRL and LLaMA-Factory write them, which differ in the name of the label."""
    prompt, read = prompt_in("prompt"), labelled_rows.completion
    tuned = "TRL" if label == "label" else "LLaMA-Factory"
    yield _labelled(f"{tuned} unpaired", ("prompt", "completion", label), read(prompt, "completion", label), "prompt")
    yield _labelled("unpaired answers", ("prompt", "response", label), read(prompt, "response", label), "prompt")
    for turns_field in ("messages", "conversations"):
        talk = labelled_rows.conversation(turns_field, label)
        yield _labelled(f"{tuned} unpaired, {turns_field}", (turns_field, label), talk, turns_field)
    keys, alpaca_answer = ("instruction", "output", label), read(pair_rows.instruction, "output", label)
    yield _labelled(f"{tuned} unpaired, alpaca", keys, alpaca_answer, "instruction", ("input", "history"))


FORMATS: tuple[Format, ...] = (
    # --- two answers and a judgement
    Format(
        "arena",
        ("conversation_a", "conversation_b", "winner"),
        judged_rows.arena,
        prompt_field="conversation_a",
        also=("turn", "judge"),
        better="the conversation that winner names",
    ),
    Format(
        "arena table",
        ("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b", "winner_tie"),
        judged_rows.arena_lists,
        better="the response of the model whose winner_model column is 1",
    ),
    Format(
        "arena pairs",
        ("prompt", "response_a", "response_b", "winner"),
        judged(prompt_in("prompt"), "response_a", "response_b", by_name("winner", "response_a", "response_b")),
        better="the response that winner names",
    ),
    Format(
        "PPE",
        ("prompt", "response_1", "response_2", "model_a", "model_b", "winner"),
        judged(prompt_in("prompt"), "response_1", "response_2", by_name("winner", "response_1", "response_2")),
        better="the response that winner names: model_a wrote response_1",
    ),
    Format(
        "SHP",
        ("history", "human_ref_A", "human_ref_B", "labels"),
        judged(prompt_in("history"), "human_ref_A", "human_ref_B", by_value("labels", {"1": "a", "0": "b"})),
        prompt_field="history",
        better="human_ref_A where labels is 1, human_ref_B where it is 0",
    ),
    Format(
        "LLMBar",
        ("input", "output_1", "output_2", "label"),
        judged(prompt_in("input"), "output_1", "output_2", by_value("label", {"1": "a", "2": "b"})),
        prompt_field="input",
        better="output_1 where label is 1, output_2 where it is 2",
        codes=("label",),
        proof=_numbered,
    ),
    Format(
        "AlpacaFarm",
        ("instruction", "output_1", "output_2", "preference"),
        judged(judged_rows.pandalm_prompt, "output_1", "output_2", by_preference("preference")),
        prompt_field="instruction",
        also=("input",),
        better="output_1 where preference is below 1.5, output_2 where it is above",
        codes=("preference",),
        proof=_above_one,
    ),
    Format(
        "PandaLM",
        ("instruction", "response1", "response2", "annotator1"),
        judged_rows.voted(judged_rows.pandalm_prompt, "response1", "response2", judged_rows.pandalm_votes),
        prompt_field="instruction",
        also=("input", *(f"annotator{number}" for number in range(2, 10))),
        better="the response that more than half of the annotators prefer (1 is response1, 2 is response2, 0 neither)",
        codes=("annotator1",),
        proof=_with_two,
    ),
    Format(
        "JudgeBench",
        ("question", "response_A", "response_B", "label"),
        judged(prompt_in("question"), "response_A", "response_B", by_name("label", "response_A", "response_B")),
        prompt_field="question",
        better="response_A where label is A>B, response_B where it is B>A",
    ),
    Format(
        "Auto-J",
        ("scenario", "prompt", "response 1", "response 2", "label"),
        judged(prompt_in("prompt"), "response 1", "response 2", by_value("label", {"0": "a", "1": "b", "2": "tie"})),
        better="response 1 where label is 0, response 2 where it is 1; 2 is a tie",
        codes=("label",),
        proof=_with_zero,
    ),
    Format(
        "Prometheus",
        ("orig_instruction", "orig_response_A", "orig_response_B", "orig_preference"),
        judged(
            prompt_in("orig_instruction"),
            "orig_response_A",
            "orig_response_B",
            by_name("orig_preference", "orig_response_A", "orig_response_B"),
        ),
        prompt_field="orig_instruction",
        better="the response that orig_preference names",
    ),
    Format(
        "HelpSteer2 preference",
        ("prompt", "response_1", "response_2", "preference_strength"),
        judged(_helpsteer_prompt, "response_1", "response_2", by_sign("preference_strength")),
        better="response_1 where preference_strength is negative, response_2 where it is positive",
        codes=("preference_strength",),
        proof=_signed,
    ),
    Format(
        "HelpSteer3",
        ("context", "response1", "response2", "overall_preference"),
        judged(prompt_in("context"), "response1", "response2", by_sign("overall_preference")),
        prompt_field="context",
        better="response1 where overall_preference is negative, response2 where it is positive",
        codes=("overall_preference",),
        proof=_signed,
    ),
    Format(
        "PKU-SafeRLHF",
        ("prompt", "response_0", "response_1", "better_response_id"),
        judged(prompt_in("prompt"), "response_0", "response_1", by_value("better_response_id", {"0": "a", "1": "b"})),
        better="the response whose number is better_response_id (safer_response_id may name the other one)",
    ),
    Format(
        "WebGPT",
        ("question", "answer_0", "answer_1", "score_0", "score_1"),
        rated_rows.scored(judged_rows.webgpt_prompt, ("answer_0", "answer_1"), ("score_0", "score_1")),
        prompt_field="question",
        better="the answer with the higher score",
    ),
    Format(
        "summary comparisons",
        ("info", "summaries", "choice"),
        judged_rows.summaries,
        prompt_field="info",
        better="the summary whose place, counted from 0, is choice",
    ),
    # --- several rated answers
    Format(
        "UltraFeedback completions",
        ("instruction", "completions"),
        rated_rows.items(pair_rows.instruction, "completions", "response", "overall_score"),
        _items_with("completions", "response"),
        "instruction",
        better="the completion with the higher overall_score",
        strict=True,
    ),
    Format(
        "CodeUltraFeedback",
        ("instruction", "responses", "annotations"),
        rated_rows.code_ultrafeedback,
        prompt_field="instruction",
        better="the response with the higher rating",
    ),
    Format(
        "Nectar",
        ("prompt", "answers"),
        rated_rows.items(prompt_in("prompt"), "answers", "answer", "rank", ranks=True),
        _ranked,
        better="the answer with the lower rank",
        strict=True,
    ),
    Format(
        "HelpSteer",
        ("prompt", "response", "helpfulness"),
        rated_rows.helpsteer,
        better="of the answers to one prompt, in neighbouring rows, that with the higher helpfulness",
    ),
    # --- single answers
    Format(
        "Open WebUI feedback",
        ("data", "meta", "snapshot"),
        labelled_rows.feedback,
        labelled_rows.is_feedback,
        "snapshot",
        better="an answer is desirable where its rating is 1, undesirable where it is -1",
        strict=True,
        single=True,
    ),
    Format(
        "Open WebUI chats",
        ("chat",),
        labelled_rows.rated_chat,
        labelled_rows.is_chat,
        "chat",
        better="an answer is desirable where its rating is 1, undesirable where it is -1",
        strict=True,
        single=True,
    ),
    # --- a chosen and a rejected answer
    Format(
        "OpenAI",
        ("input", "preferred_output", "non_preferred_output"),
        pair_rows.openai,
        prompt_field="input",
        better="preferred_output, as its name says",
    ),
    Format(
        "ms-swift",
        ("messages",),
        pair_rows.ms_swift,
        lambda row: bool({"rejected_response", "rejected_messages"} & row.keys()),
        "messages",
        ("rejected_response", "rejected_messages"),
        "the last turn of messages, against the rejected one",
    ),
    Format("RM-Bench", ("prompt", *PAIR), pair_rows.answer_lists, _lists_of_texts, strict=True),
    Format("ShareGPT", ("conversations", *PAIR), turns("conversations"), prompt_field="conversations"),
    Format("UltraInteract", ("trajectory", *PAIR), turns("trajectory"), prompt_field="trajectory"),
    Format("UltraFeedback", ("prompt", *PAIR), turns("prompt"), _scored),
    Format("TRL conversational", ("prompt", *PAIR), turns("prompt"), _listed_pair),
    Format("Axolotl", ("messages", *PAIR), turns("messages"), _listed_pair, "messages"),
    Format("rm-static", ("prompt", "response", *PAIR), texts("prompt"), _pair_of_texts),
    Format("TRL standard", ("prompt", *PAIR), texts("prompt"), _pair_of_texts),
    Format("orca", ("question", *PAIR), texts("question"), prompt_field="question"),
    Format("orca", ("system", "input", *PAIR), texts("input"), prompt_field="input"),
    Format(
        "Argilla",
        ("instruction", *_RESPONSES),
        alpaca(*_RESPONSES),
        prompt_field="instruction",
        also=("input", "history"),
        better="chosen_response, as its name says",
    ),
    Format(
        "H2O",
        ("prompt", *_RESPONSES),
        texts("prompt", *_RESPONSES),
        better="chosen_response, as its name says",
    ),
    Format(
        "alpaca",
        ("instruction", *PAIR),
        alpaca(*PAIR),
        prompt_field="instruction",
        also=("input", "history"),
    ),
    *(
        Format(
            "distilabel",
            ("instruction", "generations", ratings),
            rated_rows.parallel(pair_rows.instruction, "generations", ratings),
            prompt_field="instruction",
            better=f"the generation with the higher value in {ratings}",
        )
        for ratings in _RATINGS
    ),
    Format("TRL conversational, implicit prompt", PAIR, turns(None), _listed_pair, "chosen"),
    Format("HH transcripts", PAIR, pair_rows.hh, lambda row: is_transcript(row["chosen"]), "chosen"),
    Format(
        "TRL standard, implicit prompt",
        PAIR,
        pair_rows.implicit_text,
        _no_prompt_column,
        "chosen",
        better="chosen, as its name says; what both texts begin with is taken for the prompt",
    ),
    # --- single answers in the shapes of training files; last, since their keys occur in others
    *_labelled_formats("label"),
    *_labelled_formats("kto_tag"),
)
