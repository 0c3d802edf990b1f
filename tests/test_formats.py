"""Rows of every format become the same pair, or are refused with the name of the faulty field."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairtune.config import Reading
from pairtune.data.conversations import read_prompt
from pairtune.data.formats import FORMATS, detect_format
from pairtune.data.preference import BadRow, LeftOut
from pairtune.data.row_parser import RowParser, halved, parse_row
from pairtune.data.sources import SourceRow
from pairtune.errors import BadInput

ROW = {
    "prompt": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Name a fish.\n\nAssistant:",
    "response": " A carp.",
    "chosen": " A carp.",
    "rejected": " No.\n",
}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = [user("Hi"), assistant("Hello."), user("Name a fish.")]
CHOSEN, REJECTED = [assistant("A carp.")], [assistant("No.")]
SHARE = [{"from": "human" if turn["role"] == "user" else "gpt", "value": turn["content"]} for turn in ASKED]

ASK = "Name a fish."

# One row of each format for the conversation ASKED (or its last turn alone) with the answers "A carp." and "No.".
SAMPLES = [
    ("rm-static", ROW, 3),
    ("TRL standard", {"prompt": "Name a fish.", "chosen": "A carp.", "rejected": "No."}, 1),
    ("TRL standard, implicit prompt", {"chosen": "Name a fish. A carp.", "rejected": "Name a fish. No."}, 1),
    ("TRL conversational", {"prompt": ASKED, "chosen": CHOSEN, "rejected": REJECTED}, 3),
    ("TRL conversational, implicit prompt", {"chosen": ASKED + CHOSEN, "rejected": ASKED + REJECTED}, 3),
    (
        "HH transcripts",
        {side: ROW["prompt"] + ROW[side] for side in ("chosen", "rejected")},
        3,
    ),
    ("alpaca", {"instruction": "Name", "input": "a fish.", "chosen": "A carp.", "rejected": "No."}, "Name\na fish."),
    (
        "alpaca",
        {"instruction": "Name a fish.", "history": [["Hi", "Hello."]], "chosen": "A carp.", "rejected": "No."},
        3,
    ),
    (
        "ShareGPT",
        {
            "conversations": SHARE,
            "chosen": {"from": "gpt", "value": "A carp."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        3,
    ),
    ("ms-swift", {"messages": ASKED + CHOSEN, "rejected_response": "No."}, 3),
    ("ms-swift", {"messages": ASKED + CHOSEN, "rejected_response": ["No."]}, 3),
    ("ms-swift", {"messages": ASKED + CHOSEN, "rejected_messages": ASKED + REJECTED}, 3),
    ("Axolotl", {"messages": ASKED, "chosen": CHOSEN[0], "rejected": REJECTED[0]}, 3),
    ("orca", {"system": "Be brief.", "question": "Name a fish.", "chosen": "A carp.", "rejected": "No."}, "system"),
    ("orca", {"system": "", "question": "Name a fish.", "chosen": "A carp.", "rejected": "No."}, 1),
    ("orca", {"system": "Be brief.", "input": "Name a fish.", "chosen": "A carp.", "rejected": "No."}, "system"),
    (
        "UltraFeedback",
        {
            "prompt": "Name a fish.",
            "prompt_id": "7",
            "messages": [user("Name a fish."), *CHOSEN],
            "chosen": [user("Name a fish."), *CHOSEN],
            "rejected": [user("Name a fish."), *REJECTED],
            "score_chosen": 8.0,
            "score_rejected": 3.0,
        },
        1,
    ),
    (
        "UltraFeedback",
        {
            "prompt": "Name a fish.",
            "chosen": [user("Name a fish."), *CHOSEN],
            "rejected": [user("Name a fish."), *REJECTED],
            "chosen-rating": 5,
            "rejected-rating": 2,
        },
        1,
    ),
    ("Argilla", {"instruction": "Name a fish.", "chosen_response": "A carp.", "rejected_response": "No."}, 1),
    ("H2O", {"prompt": "Name a fish.", "chosen_response": "A carp.", "rejected_response": "No."}, 1),
    (
        "OpenAI",
        {
            "input": {"messages": ASKED, "tools": [], "parallel_tool_calls": True},
            "preferred_output": CHOSEN,
            "non_preferred_output": REJECTED,
        },
        3,
    ),
    ("SHP", {"history": "Name a fish.", "human_ref_A": "A carp.", "human_ref_B": "No.", "labels": 1}, 1),
    ("SHP", {"history": "Name a fish.", "human_ref_A": "No.", "human_ref_B": "A carp.", "labels": "0"}, 1),
    ("arena", {"conversation_a": ASKED + CHOSEN, "conversation_b": ASKED + REJECTED, "winner": "model_a"}, 3),
    ("arena", {"conversation_a": ASKED + REJECTED, "conversation_b": ASKED + CHOSEN, "winner": "model_b"}, 3),
    (
        "arena table",
        {
            "id": 1,
            "model_a": "m",
            "model_b": "n",
            "prompt": '["Hi","Name a fish."]',
            "response_a": '["Hello.","No."]',
            "response_b": '["Hello.","A carp."]',
            "winner_model_a": 0,
            "winner_model_b": 1,
            "winner_tie": 0,
        },
        3,
    ),
    ("arena pairs", {"prompt": "Name a fish.", "response_a": "A carp.", "response_b": "No.", "winner": "model_a"}, 1),
    (
        "PPE",
        {
            "prompt": "Name a fish.",
            "response_1": "No.",
            "response_2": "A carp.",
            "model_a": "m",
            "model_b": "n",
            "winner": "model_b",
        },
        1,
    ),
    ("LLMBar", {"input": "Name a fish.", "output_1": "No.", "output_2": "A carp.", "label": 2}, 1),
    (
        "AlpacaFarm",
        {"instruction": "Name", "input": "a fish.", "output_1": "A carp.", "output_2": "No.", "preference": 1.0},
        "Name\na fish.",
    ),
    (
        "PandaLM",
        {
            "idx": 0,
            "instruction": "Name a fish.",
            "input": float("nan"),
            "response1": "No.",
            "response2": "A carp.",
            "annotator1": 2,
            "annotator2": 2,
            "annotator3": 0,
        },
        1,
    ),
    ("JudgeBench", {"question": "Name a fish.", "response_A": "No.", "response_B": "A carp.", "label": "B>A"}, 1),
    (
        "Auto-J",
        {"scenario": "x", "prompt": ASK, "response 1": "A carp.", "response 2": "No.", "label": 0},
        1,
    ),
    (
        "Auto-J",
        {"scenario": "x", "prompt": ASK, "response 1": "No.", "response 2": "A carp.", "label": 1},
        1,
    ),
    (
        "Prometheus",
        {
            "orig_instruction": "Name a fish.",
            "orig_response_A": "A carp.",
            "orig_response_B": "No.",
            "orig_preference": "A",
            "instruction": "You are a judge",
        },
        1,
    ),
    (
        "HelpSteer2 preference",
        {"prompt": "Name a fish.", "response_1": "A carp.", "response_2": "No.", "preference_strength": -2},
        1,
    ),
    (
        "HelpSteer2 preference",
        {
            "prompt": "Hi\n<extra_id_1>Assistant\nHello.\n<extra_id_1>User\nName a fish.",
            "response_1": "No.",
            "response_2": "A carp.",
            "preference_strength": 1,
        },
        3,
    ),
    ("HelpSteer3", {"context": ASKED, "response1": "No.", "response2": "A carp.", "overall_preference": 3}, 3),
    (
        "PKU-SafeRLHF",
        {
            "prompt": "Name a fish.",
            "response_0": "No.",
            "response_1": "A carp.",
            "better_response_id": 1,
            "safer_response_id": 0,
        },
        1,
    ),
    (
        "WebGPT",
        {
            "question": {"dataset": "d", "id": "7", "full_text": "Name a fish."},
            "answer_0": "A carp.",
            "answer_1": "No.",
            "score_0": 0.5,
            "score_1": -0.5,
        },
        1,
    ),
    (
        "summary comparisons",
        {
            "info": {"id": "7", "post": "Name a fish.", "title": "t"},
            "summaries": [{"text": " No.", "policy": "p"}, {"text": " A carp.", "policy": "q"}],
            "choice": 1,
        },
        1,
    ),
    (
        "UltraFeedback completions",
        {
            "instruction": "Name a fish.",
            "completions": [
                {"response": "Perhaps.", "overall_score": 5.0},
                {"response": "A carp.", "overall_score": 8.5},
                {"response": "No.", "overall_score": 1.0},
            ],
        },
        1,
    ),
    (
        "CodeUltraFeedback",
        {
            "instruction": "Name a fish.",
            "preference": "readability",
            "responses": [{"model": "m", "response": "No."}, {"model": "n", "response": "A carp."}],
            "annotations": [{"model": "n", "rating": "4"}, {"model": "m", "rating": "1"}],
        },
        1,
    ),
    (
        "Nectar",
        {
            "prompt": ROW["prompt"],
            "answers": [{"answer": "No.", "rank": 7.0}, {"answer": "A carp.", "rank": 1.0}],
        },
        3,
    ),
    ("RM-Bench", {"prompt": "Name a fish.", "chosen": ["A carp."], "rejected": ["No."], "domain": "chat"}, 1),
    ("UltraInteract", {"trajectory": SHARE, "chosen": "A carp.", "rejected": "No."}, 3),
    ("ShareGPT", {"conversations": SHARE, "chosen": "A carp.", "rejected": "No."}, 3),
    ("distilabel", {"instruction": "Name a fish.", "generations": ["No.", "A carp."], "ratings": [1, 5]}, 1),
    ("distilabel", {"instruction": "Name a fish.", "generations": ["A carp.", "No."], "rating": [4.0, 2.0]}, 1),
]
# Formats whose rows have one answer each and become pairs together.
JOINED = {"HelpSteer"}


def chat(*ratings):
    """Open WebUI's export of a chat in which the last question has one answer for each rating."""
    talk = [{"role": "user", "content": ASKED[0]["content"]}, *ASKED[1:]]
    messages = {
        str(number): {"id": str(number), "parentId": str(number - 1) if number else None, **turn}
        for number, turn in enumerate(talk)
    }
    for number, rating in enumerate(ratings):
        texts = {1: "A carp.", -1: "No.", 0: "A pike.", None: "A pike."}
        thumb = {} if rating is None else {"annotation": {"rating": rating, "reason": "", "comment": ""}}
        parent = str(len(talk) - 1)
        messages[f"a{number}"] = {"parentId": parent, "role": "assistant", "content": texts[rating], **thumb}
    return {"title": "Fish", "history": {"messages": messages, "currentId": "a0"}, "messages": []}


def rated(rating, **changes):
    data = {"rating": rating, "model_id": "smollm2", "reason": "", "comment": ""}
    snapshot = {"chat": {"id": "c", "chat": chat(rating)}}
    return {"id": "f", "type": "rating", "data": data, "meta": {"message_id": "a0"}, "snapshot": snapshot, **changes}


# Single answers: a row of each format with the label True or False.
SINGLE = [
    (f"{tool} unpaired{more}", lambda good, row=row, label=label: {**row, label: good})
    for tool, label in (("TRL", "label"), ("LLaMA-Factory", "kto_tag"))
    for more, row in (
        ("", {"prompt": ASKED, "completion": CHOSEN}),
        (", messages", {"messages": ASKED + CHOSEN}),
        (", conversations", {"conversations": [*SHARE, {"from": "gpt", "value": "A carp."}]}),
        (
            ", alpaca",
            {
                "instruction": ASKED[-1]["content"],
                "history": [[turn["content"] for turn in ASKED[:2]]],
                "output": "A carp.",
            },
        ),
    )
]
SINGLE += [
    ("TRL unpaired", lambda good: {"prompt": ROW["prompt"], "completion": "A carp.", "label": int(good)}),
    ("unpaired answers", lambda good: {"prompt": ASKED, "response": "A carp.", "label": "👍" if good else "👎"}),
    ("Open WebUI chats", lambda good: {"id": "c", "title": "Fish", "chat": chat(1 if good else -1, None)}),
    ("Open WebUI feedback", lambda good: rated(1 if good else -1)),
]


@pytest.mark.parametrize("good", [True, False])
@pytest.mark.parametrize(("name", "row"), SINGLE)
def test_single_answers_are_read_for_unpaired_losses(name, row, good):
    assert detect_format(row(good)).name == name
    (pair,) = RowParser(Reading(wanted="single answers")).parse(row(good), "file:1")
    assert (list(pair.prompt), pair.single, bool(pair.chosen), bool(pair.rejected)) == (ASKED, True, good, not good)
    text = "No." if "WebUI" in name and not good else "A carp."
    assert pair.chosen + pair.rejected == text
    assert pair.conversational() == {"prompt": ASKED, "completion": [assistant(text)], "label": good}
    with pytest.raises(BadRow, match="one answer with a label, which --loss kto or bco"):
        parse_row(row(good), "file:1")


def test_a_chat_gives_all_its_rated_answers():
    (one, other) = RowParser(Reading(wanted="single answers")).parse({"chat": chat(1, None, -1)}, "f:1")
    assert (one.chosen, other.rejected, other.origin) == ("A carp.", "No.", "f:1.2")
    told = chat(1)
    told["params"] = {"system": SYSTEM["content"]}
    (pair,) = RowParser(Reading(wanted="single answers")).parse({"chat": told}, "f:1")
    assert list(pair.prompt) == [SYSTEM, *ASKED]


def test_a_pair_is_two_single_answers():
    parsed = RowParser(Reading(wanted="single answers")).parse_all([SourceRow("f", 1, ROW), SourceRow("f", 2, {})])
    (_, one), (place, other), (fault, _) = halved(parsed)
    assert (place.further, fault.further) == (True, False)
    assert (one.chosen, one.rejected, one.origin) == ("A carp.", "", "f:1")
    assert (other.chosen, other.rejected, other.origin) == ("", "No.", "f:1.2")
    assert [half.single for half in (one, other)] == [True, True]


LOOP = chat(1)
LOOP["history"]["messages"]["0"]["parentId"] = "a0"
LOST = chat(1)
LOST["history"]["messages"]["a0"]["parentId"] = "gone"
TOOLS = chat(1)
TOOLS["history"]["messages"]["a0"]["content"] = '<details type="tool_calls" id="1">{}</details> A carp.'
ANSWER = {"prompt": "Q", "completion": "A", "label": True}


@pytest.mark.parametrize(
    ("row", "kind", "reason", "field"),
    [
        ({**ANSWER, "label": None}, LeftOut, "no label", "label"),
        ({**ANSWER, "completion": " "}, BadRow, "empty completion", "completion"),
        ({**ANSWER, "completion": [user("A")]}, BadRow, "no answer at the end", "completion"),
        ({"chat": chat(None)}, LeftOut, "no rated answer", "chat"),
        ({"chat": LOOP}, BadRow, "broken chat", "chat"),
        ({"chat": LOST}, BadRow, "broken chat", "chat"),
        ({"chat": TOOLS}, BadRow, "tool calls", "chat"),
        (rated(0), LeftOut, "no thumb", "data"),
        (rated(1, snapshot=None), BadRow, "no rated message", "snapshot"),
        (rated(1, meta={}), BadRow, "no rated message", "snapshot"),
    ],
)
def test_single_answers_that_cannot_be_used(row, kind, reason, field):
    with pytest.raises(kind) as caught:
        RowParser(Reading(wanted="single answers")).parse(row, "f:1")
    assert (caught.value.reason, caught.value.field) == (reason, field)


@pytest.mark.parametrize(
    ("good", "odd", "field"),
    [
        (rated(1), rated(1, data=None), "data"),
        (rated(1), {"id": "f", "data": {"rating": 1}, "snapshot": {}}, "meta"),
        (rated(1), rated(1, meta="m"), "meta"),
        ({"chat": chat(1)}, {"id": "c"}, "chat"),
        ({"chat": chat(1)}, {"chat": None}, "chat"),
        ({"chat": chat(1)}, {"chat": {"history": []}}, "chat"),
    ],
)
def test_odd_rows_of_exports_are_faults_wherever_they_come(good, odd, field):
    for rows in ([good, odd], [odd, good], [odd]):
        parser = RowParser(Reading(wanted="single answers"))
        found = [result for _, result in parser.parse_all([SourceRow("f", at, row) for at, row in enumerate(rows, 1)])]
        faults = [each for each in found if isinstance(each, BadRow)]
        assert len(faults) == 1
        assert faults[0].field in (field, "")  # alone it is in no known format


def test_one_broken_answer_does_not_cost_the_others_of_its_chat():
    told = chat(1, -1)
    told["history"]["messages"]["a1"]["content"] = ""
    parsed = RowParser(Reading(wanted="single answers")).parse_all([SourceRow("f", 1, {"chat": told})])
    (_, one), (place, fault) = parsed
    assert (one.chosen, fault.reason, place.further) == ("A carp.", "empty turn", True)


def test_reasoning_in_a_chat_is_no_part_of_its_answers():
    told = chat(1)
    block = '<details type="reasoning" done="true"><summary>Thought</summary>\n> Fish?\n> A carp.\n</details>\n'
    for key in ("1", "a0"):
        told["history"]["messages"][key]["content"] = block + told["history"]["messages"][key]["content"]
    (pair,) = RowParser(Reading(wanted="single answers")).parse({"chat": told}, "f:1")
    assert (list(pair.prompt), pair.chosen, pair.thinking) == (ASKED, "A carp.", ("Fish?\nA carp.", ""))


def test_columns_of_single_answers_can_be_named():
    row = {"ask": "Name a fish.", "said": "A carp.", "thumb": "Up"}
    columns = {"prompt": "ask", "completion": "said", "label": "thumb"}
    parser = RowParser(Reading(columns, wanted="single answers"))
    parser.prepare([row], Counter, "--data f")
    (pair,) = parser.parse(row, "f:1")
    assert (pair.chosen, pair.rejected) == ("A carp.", "")
    with pytest.raises(BadRow, match="is 5 stars, which is neither"):
        parser.parse({**row, "thumb": "5 stars"}, "f:2")
    for wrong, told in (
        ({"completion": "said"}, "--label NAME: name the column that says whether an answer is good"),
        ({**columns, "chosen": "ask"}, "is a single answer; omit chosen"),
    ):
        with pytest.raises(BadInput, match=told):
            RowParser(Reading(wrong, wanted="single answers")).prepare([row], Counter, "--data f")


@pytest.mark.parametrize(("name", "row", "prompt"), SAMPLES)
def test_each_format_is_told_by_its_keys_and_gives_the_same_pair(name, row, prompt):
    assert detect_format(row).name == name
    pair = parse_row(row, "file:1")
    expected = {3: ASKED, 1: [user("Name a fish.")], "system": [SYSTEM, user("Name a fish.")]}
    assert list(pair.prompt) == expected.get(prompt, [user(str(prompt))])
    assert (pair.chosen, pair.rejected, pair.origin) == ("A carp.", "No.", "file:1")


def test_every_format_has_a_sample():
    samples = {name for name, *_ in (*SAMPLES, *SINGLE)}
    assert {known.name for known in FORMATS} - JOINED == samples


def test_the_pair_goes_out_in_trls_conversational_format():
    assert parse_row(ROW, "file:1").conversational() == {"prompt": ASKED, "chosen": CHOSEN, "rejected": REJECTED}


def test_answers_that_repeat_the_prompt_do_not_double_it():
    row = {"prompt": [SYSTEM, *ASKED], "chosen": ASKED + CHOSEN, "rejected": ASKED + REJECTED}
    assert list(parse_row(row, "f:1").prompt) == [SYSTEM, *ASKED]
    row = {"prompt": [SYSTEM, *ASKED], "chosen": [SYSTEM, *ASKED, *CHOSEN], "rejected": [SYSTEM, *ASKED, *REJECTED]}
    assert list(parse_row(row, "f:1").prompt) == [SYSTEM, *ASKED]


def test_text_in_parts_is_text():
    parts = [{"type": "text", "text": "Name "}, {"type": "text", "text": "a fish."}]
    row = {"prompt": [{"role": "user", "content": parts}], "chosen": CHOSEN, "rejected": REJECTED}
    assert parse_row(row, "f:1").prompt == (user("Name a fish."),)


def test_columns_can_be_named():
    parser = RowParser(Reading({"prompt": "ask", "chosen": "good", "rejected": "bad", "system": "rules"}))
    row = {"ask": "Name a fish.", "good": "A carp.", "bad": "No.", "rules": "Be brief."}
    parser.prepare([row], Counter, "--data f")
    (pair,) = parser.parse(row, "f:1")
    assert pair.prompt == (SYSTEM, user("Name a fish."))
    assert (pair.chosen, pair.rejected) == ("A carp.", "No.")
    with pytest.raises(BadRow, match="is missing") as caught:
        parser.parse({"ask": "Name a fish.", "good": "A carp."}, "f:2")
    assert caught.value.field == "rejected"


def test_a_source_keeps_its_first_format():
    parser = RowParser()
    parser.parse({"prompt": "Name a fish.", "chosen": "A carp.", "rejected": "No."}, "f:1")
    with pytest.raises(BadRow, match="is in the format alpaca, but earlier rows are in TRL standard") as caught:
        parser.parse({"instruction": "Name a fish.", "chosen": "A carp.", "rejected": "No."}, "f:2")
    assert caught.value.reason == "mixed formats"
    with pytest.raises(BadRow, match="is missing") as caught:
        parser.parse({"chosen": "A carp.", "rejected": "No."}, "f:3")
    assert caught.value.reason == "no prompt"


def test_plain_prompt_is_one_user_turn_even_when_it_speaks_of_humans():
    text = " Why do Human: and Assistant: stand there?\n"
    assert read_prompt(text, "prompt") == [user("Why do Human: and Assistant: stand there?")]


def test_words_that_only_look_like_a_turn_stay_in_it():
    (turn,) = read_prompt("\n\nHuman: One\nHuman: two\n\nAssistant:", "prompt")
    assert turn["content"] == "One\nHuman: two"


CONVERSATION = {"prompt": ASKED, "chosen": CHOSEN, "rejected": REJECTED}
HH = SAMPLES[5][1]
ARENA = {"conversation_a": ASKED + CHOSEN, "conversation_b": ASKED + REJECTED, "winner": "model_a"}


@pytest.mark.parametrize(
    ("row", "change", "reason", "field"),
    [
        (ROW, {"chosen": None}, "chosen is not text", "chosen"),
        (ROW, {"chosen": 3}, "chosen is not text", "chosen"),
        (ROW, {"rejected": ["a"]}, "rejected is not text", "rejected"),
        (ROW, {"chosen": "  \n"}, "empty chosen", "chosen"),
        (ROW, {"rejected": ""}, "empty rejected", "rejected"),
        (ROW, {"prompt": " "}, "empty prompt", "prompt"),
        (ROW, {"rejected": "A carp."}, "chosen equals rejected", "rejected"),
        (ROW, {"chosen": "half \ud83d"}, "chosen is not valid Unicode", "chosen"),
        (ROW, {"prompt": "\n\nHuman: Hi"}, "prompt has no open turn", "prompt"),
        (ROW, {"prompt": "\n\nHuman: Hi\n\nAssistant: Yes"}, "prompt has no open turn", "prompt"),
        (ROW, {"prompt": "\n\nAssistant:"}, "prompt has no open turn", "prompt"),
        (ROW, {"prompt": "\n\nHuman:\n\nAssistant: a\n\nHuman: b\n\nAssistant:"}, "empty turn in prompt", "prompt"),
        (ROW, {"prompt": "\n\nHuman: a\n\nHuman: b\n\nAssistant:"}, "roles do not alternate", "prompt"),
        (HH, {"rejected": "\n\nHuman: Other\n\nAssistant: No."}, "prompts differ", "rejected"),
        (HH, {"rejected": "\n\nHuman: Hi\n\nAssistant:"}, "empty rejected", "rejected"),
        (HH, {"rejected": "\n\nHuman: Hi"}, "no answer at the end", "rejected"),
        (HH, {"rejected": 5}, "rejected is not text", "rejected"),
        (CONVERSATION, {"prompt": [ASKED[0], ASKED[2]]}, "roles do not alternate", "prompt"),
        (CONVERSATION, {"prompt": ASKED[:2]}, "prompt has no open turn", "prompt"),
        (CONVERSATION, {"prompt": [{"role": "wizard", "content": "x"}]}, "unknown role", "prompt"),
        (CONVERSATION, {"prompt": ["x"]}, "prompt is not turns", "prompt"),
        (CONVERSATION, {"chosen": [user("Me?")]}, "no answer at the end", "chosen"),
        (CONVERSATION, {"chosen": [assistant(" ")]}, "empty turn", "chosen"),
        (CONVERSATION, {"chosen": [{**assistant("a"), "tool_calls": [{}]}]}, "tool calls", "chosen"),
        (CONVERSATION, {"prompt": [{**user("a"), "tool_calls": [{}]}]}, "tool calls", "prompt"),
        (CONVERSATION, {"prompt": [user("a"), {"role": "tool", "content": "b"}]}, "roles do not alternate", "prompt"),
        (CONVERSATION, {"tools": "no JSON"}, "tools are no list", "tools"),
        (CONVERSATION, {"images": ["a.png"]}, "images", "images"),
        (CONVERSATION, {"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "images", "prompt"),
        (CONVERSATION, {"rejected": []}, "empty rejected", "rejected"),
        (CONVERSATION, {"rejected": [assistant("a"), user("b"), assistant("c")]}, "prompts differ", "rejected"),
        ({"chosen": "Yes.", "rejected": "No."}, {}, "no common prefix", "rejected"),
        ({"prompt": "p", "completion": "c", "label": True}, {}, "not a pair", ""),
        ({"a": 1, "b": 2}, {}, "unknown format", ""),
        (ARENA, {"winner": "me"}, "unknown label", "winner"),
    ],
)
def test_unusable_rows_are_refused_by_reason_and_field(row, change, reason, field):
    with pytest.raises(BadRow) as caught:
        parse_row({**row, **change}, "file:1")
    assert (caught.value.reason, caught.value.field) == (reason, field)
    assert not isinstance(caught.value, LeftOut)
    assert "\n" not in str(caught.value)


ULTRA = SAMPLES[16][1]


@pytest.mark.parametrize(
    ("row", "change", "reason"),
    [
        (ARENA, {"winner": "tie"}, "tie"),
        (ARENA, {"winner": "tie (bothbad)"}, "tie"),
        (
            ARENA,
            {"conversation_b": [user("Hi"), assistant("What?"), user("Name a fish."), *REJECTED]},
            "conversations part before the last answer",
        ),
        (ULTRA, {"score_rejected": 8.0}, "tie"),
    ],
)
def test_rows_without_a_preference_are_left_out_but_are_no_fault(row, change, reason):
    with pytest.raises(LeftOut) as caught:
        parse_row({**row, **change}, "file:1")
    assert caught.value.reason == reason


@pytest.mark.parametrize("name", ["chosen", "rejected"])
def test_a_missing_field_is_named_with_those_that_are_there(name):
    row = {key: value for key, value in ROW.items() if key != name}
    with pytest.raises(BadRow, match="is missing; the row has .*response") as caught:
        parse_row(row, "file:1")
    assert (caught.value.reason, caught.value.field) == (f"no {name}", name)


def test_a_field_name_with_a_line_break_keeps_the_message_on_one_line():
    with pytest.raises(BadRow, match=r"it has a b, c\. Nearest"):
        parse_row({"a\nb": 1, "c": 2}, "file:1")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
fragments = st.lists(
    st.sampled_from(["\n\nHuman: a", "\n\nAssistant: b", "\n\nAssistant:", "x", "\n\nHuman:"]), max_size=5
)
sometimes_turns = st.lists(
    st.builds(
        lambda role, content: {"role": role, "content": content},
        st.sampled_from(["user", "assistant", "system", "gpt", 3]),
        st.sampled_from(["a", "b", "", None]),
    ),
    max_size=4,
)
values = json_values | fragments.map("".join) | sometimes_turns
keys = sorted({key for _, row, _ in SAMPLES for key in row})


@given(
    st.sampled_from(SAMPLES), st.dictionaries(st.sampled_from(keys), values, max_size=4), st.sets(st.sampled_from(keys))
)
def test_any_row_is_a_pair_or_a_bad_row(sample, changes, removed):
    row = {key: value for key, value in {**sample[1], **changes}.items() if key not in removed}
    for any_row in (row, changes):
        try:
            pair = parse_row(any_row, "file:1")
        except BadRow as fault:
            assert fault.reason
            assert "\n" not in str(fault)
        else:
            assert pair.chosen.strip() and pair.rejected.strip() and pair.chosen != pair.rejected
            assert pair.prompt[-1]["role"] == "user"
            assert all(turn["content"].strip() for turn in pair.prompt)
