"""The rule behind the bundled pairs, and that the shipped pairs follow it."""

from __future__ import annotations

import json
from importlib import resources

import pytest

from pairtune.data.concise import Sample, flaw_of, is_repetitive, is_sensible, make_pairs
from pairtune.data.sources import BUNDLED_SPLITS

PROMPT = "How do I keep cut apples from turning brown?"
GOOD = Sample("Squeeze some lemon juice over the apples, since the acid slows the browning down.", 30, True)
LONG = Sample("Apples are a fruit. " * 20, 110, True)
CUT = Sample("Apples have been grown for a very long time, and so", 160, False)
TERSE = Sample("Use lemon.", 4, True)


@pytest.mark.parametrize(
    ("answer", "sensible"),
    [
        (GOOD, True),
        (Sample(GOOD.text, 24, True), False),
        (Sample(GOOD.text, 25, True), True),
        (Sample(GOOD.text, 65, True), True),
        (Sample(GOOD.text, 66, True), False),
        (Sample(GOOD.text, 30, False), False),
        (Sample(GOOD.text.rstrip("."), 30, True), False),
        (Sample("Sure! " + GOOD.text, 30, True), False),
        (Sample("1. Lemon\n2. " + GOOD.text, 30, True), False),
        (Sample("Water keeps the air away, so put the slices into a bowl of it.", 30, True), False),
        (Sample("Cut apples turn brown, cut apples turn brown, and so on.", 30, True), False),
    ],
)
def test_what_may_be_chosen(answer, sensible):
    assert is_sensible(PROMPT, answer) is sensible


def test_flaws():
    assert [flaw_of(answer) for answer in (GOOD, LONG, CUT, TERSE)] == [None, "rambling", "cut off", "terse"]
    assert flaw_of(Sample("Apples are", 2, False)) is None


def test_repetition():
    assert is_repetitive("a b c d a b c")
    assert is_repetitive("")
    assert not is_repetitive("one two three four")


def test_pairs_say_both_that_long_and_that_terse_is_worse():
    pairs = make_pairs(PROMPT, [CUT, LONG, TERSE, GOOD])
    assert [(pair.chosen, pair.rejected, pair.flaw) for pair in pairs] == [
        (GOOD, LONG, "rambling"),
        (GOOD, TERSE, "terse"),
    ]
    assert make_pairs(PROMPT, [CUT, LONG, TERSE]) == []
    assert make_pairs(PROMPT, [GOOD]) == []


def test_the_answer_closest_to_the_question_is_chosen_then_the_one_of_ideal_length():
    off = Sample("Keep the slices in a bowl of cold water until you serve them, and drain it.", 42, True)
    assert make_pairs(PROMPT, [off, GOOD, LONG])[0].chosen == GOOD
    ideal = Sample(GOOD.text, 42, True)
    assert make_pairs(PROMPT, [GOOD, ideal, LONG])[0].chosen == ideal


@pytest.mark.parametrize("split", BUNDLED_SPLITS)
def test_shipped_pairs_follow_the_rule(split):
    file = resources.files("pairtune.data") / "bundled" / "concise" / f"{split}.jsonl"
    prompts = set((file.parent / "prompts.txt").read_text(encoding="utf-8").splitlines())  # type: ignore[attr-defined]
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert row["prompt"] in prompts
        assert is_sensible(row["prompt"], Sample(row["chosen"], row["chosen_tokens"], True))
        assert flaw_of(Sample(row["rejected"], row["rejected_tokens"], row["flaw"] != "cut off")) == row["flaw"]
