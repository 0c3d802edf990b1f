"""The rule behind `bundled:concise`: direct, complete answers of a sensible length over rambling or cut-off ones.

The rule is transparent on purpose: anyone can read it, disagree with it and change it. It judges form only, not truth:
the bundled model is small, and both the chosen and the rejected answers are often wrong.

"The shortest complete answer wins" is the obvious rule and a bad one: a model tuned on it learns that shorter is
always better, and ends at a few words. So an answer is preferred if its length lies in a range, and the pairs point in
both directions: a sensible answer over a rambling one and, if the model gave one, a sensible answer over a terse one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

SENSIBLE_TOKENS = range(25, 66)
IDEAL_TOKENS = 42
RAMBLING_TOKENS = 90
TERSE_TOKENS = 15
FEWEST_DIFFERENT_WORDS = 0.62

# Openings that delay the answer.
_CHATTY = re.compile(
    r"(what an? |i'm |i am |i'd |i've |i would |i think |as an? |sure|certainly|of course|great |that's |let's |hello|"
    r"hi |dear |here's |here is |here are |imagine |my |we )",
    re.IGNORECASE,
)
_ENDS_A_SENTENCE = re.compile(r"[.!][\"')\u201d\u2019]?$")
_SMALL_WORDS = frozenset(
    (
        "about after also another answer before best between could does down each even every explain first from give "
        "good have help how into just keep like long make many more most much name need one only other over people "
        "should some someone something stop suggest take tell than that the their them then there these they thing "
        "this time use used very want way well what when where which while who why will with without word write you "
        "your"
    ).split()
)

Flaw = Literal["rambling", "cut off", "terse"]


@dataclass(frozen=True)
class Sample:
    """One answer of the bundled model: its text, its length in tokens, and whether the model ended it by itself."""

    text: str
    tokens: int
    ended: bool


@dataclass(frozen=True)
class ConcisePair:
    """A chosen and a rejected answer, and what is wrong with the rejected one."""

    chosen: Sample
    rejected: Sample
    flaw: Flaw


def is_sensible(prompt: str, answer: Sample) -> bool:
    """Whether an answer may be chosen: complete, 25 to 65 tokens, one paragraph, to the point, not repetitive."""
    return (
        answer.ended
        and answer.tokens in SENSIBLE_TOKENS
        and "\n" not in answer.text
        and _ENDS_A_SENTENCE.search(answer.text) is not None
        and _CHATTY.match(answer.text) is None
        and not is_repetitive(answer.text)
        and bool(_content_words(prompt) & _content_words(answer.text))
    )


def flaw_of(answer: Sample) -> Flaw | None:
    """The flaw in an answer's form, if it is bad enough for the answer to be the rejected one.

    A short answer that was cut off has no flaw: the sampling script stopped it, and the model was not rambling.
    """
    if answer.tokens >= RAMBLING_TOKENS:
        return "rambling" if answer.ended else "cut off"
    return "terse" if answer.ended and answer.tokens < TERSE_TOKENS else None


def is_repetitive(text: str) -> bool:
    """Whether too few of the words are distinct, or any three consecutive words recur."""
    words = re.findall(r"[\w']+", text.lower())
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return not words or len(set(words)) / len(words) < FEWEST_DIFFERENT_WORDS or len(set(triples)) < len(triples)


def make_pairs(prompt: str, answers: Sequence[Sample]) -> list[ConcisePair]:
    """Up to two pairs from one prompt's answers: sensible over long, and sensible over terse.

    The chosen answer is the sensible one that shares the most content words with the prompt; ties go to the one nearest
    to the ideal length. The rejected answer is the shortest of the long ones (the hardest to tell apart, and the
    cheapest to train on), or the first of the terse ones.
    """
    sensible = [answer for answer in answers if is_sensible(prompt, answer)]
    if not sensible:
        return []
    asked = _content_words(prompt)
    chosen = min(
        sensible, key=lambda answer: (-len(asked & _content_words(answer.text)), abs(answer.tokens - IDEAL_TOKENS))
    )
    long = [answer for answer in answers if flaw_of(answer) in ("rambling", "cut off")]
    terse = [answer for answer in answers if flaw_of(answer) == "terse"]
    rejected = [min(long, key=lambda answer: answer.tokens)] if long else []
    return [ConcisePair(chosen, answer, flaw) for answer in [*rejected, *terse[:1]] if (flaw := flaw_of(answer))]


def _content_words(text: str) -> set[str]:
    """The first five letters of each longer word, enough to match `apples` with `apple`."""
    words = re.findall(r"[^\W\d_]{4,}", text.lower())
    return {word[:5].rstrip("s") for word in words if word not in _SMALL_WORDS}
