"""Answer statistics that need no model: length, completion, repetition, refusals, languages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from statistics import median

from pairtune.run.records import Answer, AnswerSummary

_PHRASE = 4  # words; shorter phrases repeat in good prose too
# A text with fewer letters is too short for its language to be told.
_LETTERS_OF_A_LANGUAGE = 40

# How refusals begin. They are counted, not judged: a refusal may be right.
_REFUSAL = re.compile(
    r"^\W*(?:"
    r"i(?:['\u2019]| a)m (?:very |so |really )?(?:sorry|afraid|unable|not able)|sorry,? (?:but )?i|i apologi[sz]e"
    r"|i (?:can['\u2019]t|cannot|can not|won['\u2019]t|will not|must decline)|as an? (?:ai|language model)"
    r"|unfortunately,? i (?:can['\u2019]t|cannot))",
    re.IGNORECASE,
)


def repeated_share(text: str) -> float:
    """The share of an answer's four-word phrases that repeat an earlier one; 0 for short answers."""
    words = text.lower().split()
    phrases = [tuple(words[at : at + _PHRASE]) for at in range(len(words) - _PHRASE + 1)]
    return 1 - len(set(phrases)) / len(phrases) if phrases else 0.0


def distinct(texts: Sequence[str], words: int) -> float:
    """Distinct n-grams over all n-grams of all answers, with n = `words` (distinct-n, Li et al. 2016)."""
    phrases = [
        tuple(said[at : at + words])
        for text in texts
        for said in [text.lower().split()]
        for at in range(len(said) - words + 1)
    ]
    return len(set(phrases)) / len(phrases) if phrases else 0.0


def refuses(text: str) -> bool:
    """Whether an answer begins like an English refusal."""
    return bool(_REFUSAL.match(text))


def other_language(prompt: str, answer: str) -> bool:
    """Whether an answer is in another language than its prompt; False where either is too short to tell."""
    if min(sum(map(str.isalpha, prompt)), sum(map(str.isalpha, answer))) < _LETTERS_OF_A_LANGUAGE:
        return False
    return _language(prompt) != _language(answer)


def summarise(prompts: Sequence[str], answers: Sequence[Answer]) -> AnswerSummary:
    """Summary statistics of answers.

    Args:
        prompts: the last user turns.
        answers: one per prompt.
    """
    texts, count = [answer.text for answer in answers], len(answers)
    return AnswerSummary(
        median_tokens=float(median(answer.tokens for answer in answers)),
        ended_share=sum(answer.ended for answer in answers) / count,
        empty_share=sum(not text for text in texts) / count,
        repeated_share=round(sum(map(repeated_share, texts)) / count, 4),
        distinct_1=round(distinct(texts, 1), 4),
        distinct_2=round(distinct(texts, 2), 4),
        refused_share=sum(map(refuses, texts)) / count,
        other_language_share=sum(map(other_language, prompts, texts)) / count,
    )


@lru_cache(maxsize=4096)  # a page asks again for the same answers
def _language(text: str) -> str:
    from py3langid import classify  # loading its model takes half a second

    language: str = classify(text)[0]
    return language
