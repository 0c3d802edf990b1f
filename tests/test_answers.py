"""Answer statistics and win rates, checked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from pairtune.evaluation.answers import distinct, other_language, refuses, repeated_share, summarise
from pairtune.evaluation.winrate import LOSS, TIE, WIN, RuleJudge, faults, win_rate
from pairtune.run.records import Answer
from pairtune.statistics import share_interval

GERMAN = "Ich habe leider keine Ahnung, wie man ein solches Brot im Ofen backen könnte."
ENGLISH = "How would you bake a loaf of bread in an ordinary oven at home, please?"


def answer(text: str, tokens: int = 10, *, ended: bool = True) -> Answer:
    return Answer(text=text, tokens=tokens, ended=ended)


def test_summary_by_hand():
    prompts = ["a", "b", "c", "d"]
    answers = [
        answer("one two three four one two three four", 8),
        answer("", 0),
        answer("I'm sorry, but I cannot do that.", 12),
        answer("one two", 160, ended=False),
    ]
    assert summarise(prompts, answers).model_dump() == {
        "median_tokens": 10.0,
        "ended_share": 0.75,
        "empty_share": 0.25,
        "repeated_share": round(0.2 / 4, 4),  # one of the first answer's five phrases is said twice
        "distinct_1": round(11 / 17, 4),  # 4 + 7 words, "one" and "two" again
        "distinct_2": round(10 / 14, 4),
        "refused_share": 0.25,
        "other_language_share": 0.0,
    }


def test_repetition_and_distinct_words():
    assert repeated_share("a b c") == 0.0
    assert repeated_share("so it is " * 40) > 0.9
    assert distinct(["a b", "a c"], 1) == pytest.approx(3 / 4)
    assert distinct(["a"], 2) == 0.0


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I\u2019m sorry, but I can\u2019t help with that.", True),
        ("As an AI language model, I have no opinion.", True),
        ("Unfortunately, I cannot answer.", True),
        ("I cannot recommend this book enough!", True),  # it is counted by its beginning, not judged
        ("Sorry to hear that. Rest a little.", False),
        ("You can't mix them.", False),
        ("", False),
    ],
)
def test_refusals_are_told_by_how_they_begin(text, refused):
    assert refuses(text) is refused


def test_a_language_is_told_where_there_is_enough_text():
    assert other_language(ENGLISH, GERMAN)
    assert not other_language(ENGLISH, ENGLISH.replace("bread", "cake"))
    assert not other_language(ENGLISH, "Nein.")


def test_the_rule_counts_faults():
    assert faults(ENGLISH, answer("Bake it for an hour.")) == 0
    assert faults(ENGLISH, answer("Bake it", ended=False)) == 1
    assert faults(ENGLISH, answer("so it is and " * 40, ended=False)) == 2
    assert faults(ENGLISH, answer(GERMAN)) == 1
    assert faults(ENGLISH, answer("")) > faults(ENGLISH, answer("la la la la la la la la " * 9 + GERMAN, ended=False))
    prompts = [[{"role": "user", "content": ENGLISH}]] * 3
    fine, cut = answer("Fine."), answer("Fine", ended=False)
    assert RuleJudge().judge(prompts, [fine, cut, fine], [cut, fine, fine], lambda done: None) == [WIN, LOSS, TIE]


def test_win_rate_by_hand():
    alike = [answer("x", 5)] * 4
    rate = win_rate([WIN, WIN, TIE, LOSS], alike, alike)
    assert (rate.rate, rate.wins, rate.ties, rate.losses) == (0.625, 2, 1, 1)
    low, high = rate.interval
    assert 0 <= low < 0.625 < high <= 1
    assert rate.length_controlled == pytest.approx(0.625, abs=0.01)


def test_wins_that_length_explains_are_taken_out():
    """Longer answers win whichever model gives them: at equal lengths neither is ahead."""
    drawn = np.random.default_rng(0)
    differences = drawn.integers(-50, 100, 400)
    scores = [float(drawn.random() < 1 / (1 + np.exp(-0.06 * d))) for d in differences]
    ours, base = [answer("x", 100 + int(d)) for d in differences], [answer("x", 100)] * 400
    rate = win_rate(scores, ours, base)
    assert rate.interval[0] > 0.55
    low, high = rate.length_controlled_interval
    assert low < 0.5 < high


def test_share_interval_is_wilsons():
    # Wilson's interval for 5 of 5 and 15 of 20, from the formula in Brown, Cai and DasGupta 2001, eq. 4.
    assert share_interval(5, 5) == pytest.approx((0.5655, 1.0), abs=1e-4)
    assert share_interval(15, 20) == pytest.approx((0.5313, 0.8881), abs=1e-4)
    assert share_interval(0, 0) == (0.0, 1.0)


def test_eight_wins_of_eight_are_not_beyond_doubt():
    answers = [answer("Yes, of course.", tokens) for tokens in range(5, 13)]
    found = win_rate([1.0] * 8, answers, list(reversed(answers)))
    assert found.interval == pytest.approx((0.6756, 1.0), abs=1e-3)
    low, high = found.length_controlled_interval
    assert low <= 0.68
    assert high <= 1
