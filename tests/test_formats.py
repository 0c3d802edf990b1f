"""Rows become pairs, or are refused with the field at fault."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairtune.data.formats import BadRow, parse_prompt, parse_row

ROW = {
    "prompt": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Name a fish.\n\nAssistant:",
    "response": " A carp.",
    "chosen": " A carp.",
    "rejected": " No.\n",
}


def test_rm_static_row_becomes_chat_turns():
    pair = parse_row(ROW, "file:1")
    assert pair.prompt == (
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Name a fish."},
    )
    assert (pair.chosen, pair.rejected, pair.origin) == ("A carp.", "No.", "file:1")
    assert pair.conversational() == {
        "prompt": list(pair.prompt),
        "chosen": [{"role": "assistant", "content": "A carp."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    }


def test_plain_prompt_is_one_user_turn_even_when_it_speaks_of_humans():
    assert parse_prompt(" Why do Human: and Assistant: stand there?\n") == [
        {"role": "user", "content": "Why do Human: and Assistant: stand there?"}
    ]


def test_words_that_only_look_like_a_turn_stay_in_it():
    (turn,) = parse_prompt("\n\nHuman: One\nHuman: two\n\nAssistant:")
    assert turn["content"] == "One\nHuman: two"


@pytest.mark.parametrize(
    ("change", "reason", "field"),
    [
        ({"chosen": None}, "chosen is not text", "chosen"),
        ({"chosen": 3}, "chosen is not text", "chosen"),
        ({"rejected": ["a"]}, "rejected is not text", "rejected"),
        ({"chosen": "  \n"}, "empty chosen", "chosen"),
        ({"rejected": ""}, "empty rejected", "rejected"),
        ({"prompt": " "}, "empty prompt", "prompt"),
        ({"rejected": "A carp."}, "chosen equals rejected", "rejected"),
        ({"prompt": "\n\nHuman: Hi"}, "prompt has no open turn", "prompt"),
        ({"prompt": "\n\nHuman: Hi\n\nAssistant: Yes"}, "prompt has no open turn", "prompt"),
        ({"prompt": "\n\nAssistant:"}, "prompt has no open turn", "prompt"),
        ({"prompt": "\n\nHuman:\n\nAssistant: a\n\nHuman: b\n\nAssistant:"}, "empty turn in prompt", "prompt"),
    ],
)
def test_unusable_rows_are_refused_by_reason_and_field(change, reason, field):
    with pytest.raises(BadRow) as caught:
        parse_row({**ROW, **change}, "file:1")
    assert (caught.value.reason, caught.value.field) == (reason, field)


@pytest.mark.parametrize("name", ["prompt", "chosen", "rejected"])
def test_a_missing_field_is_named_with_those_that_are_there(name):
    row = {key: value for key, value in ROW.items() if key != name}
    with pytest.raises(BadRow, match="is missing; the row has .*response") as caught:
        parse_row(row, "file:1")
    assert (caught.value.reason, caught.value.field) == (f"no {name}", name)


def test_a_field_name_with_a_line_break_keeps_the_message_on_one_line():
    with pytest.raises(BadRow, match="the row has a b, c$"):
        parse_row({"a\nb": 1, "c": 2}, "file:1")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
turns = st.lists(st.sampled_from(["\n\nHuman: a", "\n\nAssistant: b", "\n\nAssistant:", "x", "\n\nHuman:"]), max_size=5)
rows = json_values | st.fixed_dictionaries(
    {"prompt": json_values | turns.map("".join), "chosen": json_values, "rejected": json_values}
)


@given(rows)
def test_any_row_is_a_pair_or_a_bad_row(row):
    try:
        pair = parse_row(row, "file:1")
    except BadRow as fault:
        assert fault.reason
        assert "\n" not in str(fault)
    else:
        assert pair.chosen.strip() and pair.rejected.strip() and pair.chosen != pair.rejected
        assert pair.prompt[-1]["role"] == "user"
        assert all(turn["content"].strip() for turn in pair.prompt)
