"""Which two models should meet next: those whose match tells most about the standings.

The gain of a match is what its vote adds to the determinant of the information matrix (D-optimality; Guo et al. 2018,
"Experimental Design under the Bradley-Terry Model", section 3), divided by the square of how clearly the two are told
apart already (uncertainty sampling). The first factor alone spends votes on pairs whose order nobody doubts; the second
alone spends all of them on two models that are equally good.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Literal

from pairtune.votes.records import Vote
from pairtune.votes.standings import PRIOR, Fit, Matches, fit, information

Choosing = Literal["informative", "uniform"]
_EXPLORE = 0.1  # share of matches drawn uniformly, in case the model of votes is wrong
_DOUBT = 0.05  # so that the gain of two models with equal strengths is finite


def next_match(models: Sequence[str], votes: Sequence[Vote], how: Choosing, draw: random.Random) -> tuple[str, str]:
    """The left and the right model of the next match.

    Sides are drawn by lot.

    Args:
        models: at least two, by their weights.
        votes: the votes so far.
        how: `informative` takes the pair with the largest gain, `uniform` any.
        draw: the source of chance.
    """
    pairs = list(combinations(models, 2))
    if how == "uniform" or draw.random() < _EXPLORE:
        chosen = draw.choice(pairs)
    else:
        matches = Matches.of(votes)
        gains = information_gains(models, fit(matches), matches.models)
        most = max(gains.values())
        chosen = draw.choice([pair for pair in pairs if gains[pair] >= most * (1 - 1e-9)])
    return chosen if draw.random() < 0.5 else chosen[::-1]


def information_gains(models: Sequence[str], found: Fit, known: Sequence[str]) -> dict[tuple[str, str], float]:
    """The gain of a match of each two models; of a model without votes only the prior is known."""
    place = {model: number for number, model in enumerate(known)}
    gains = {}
    for one, other in combinations(models, 2):
        gap, variance = 0.0, 2 * PRIOR**2
        if one in place and other in place:
            gap = float(found.values[place[one]] - found.values[place[other]])
            variance = found.variance(place[one], place[other])
        gains[one, other] = information(gap, found.tie) * variance / (_DOUBT + gap**2 / variance)
    return gains


def rarest_prompts(prompts: Sequence[str], votes: Sequence[Vote], count: int, draw: random.Random) -> list[str]:
    """The prompts that were voted on least often, those with as many votes in any order."""
    given = Counter(str(vote.prompt[-1]["content"]) for vote in votes)
    return sorted(prompts, key=lambda prompt: (given[prompt], draw.random()))[:count]
