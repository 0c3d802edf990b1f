"""The standings: how strong each model is, after what side and length do to votes has been taken out.

Votes follow Davidson's extension of the Bradley-Terry model to ties (Davidson 1970, "On Extending the Bradley-Terry
Model to Accommodate Ties in Paired Comparison Experiments", eq. 2), with covariates as in LMArena's style control. For
a left answer that is d ahead,

    P(left) : P(tie) : P(right) = exp(d / 2) : exp(t) : exp(-d / 2)
    d = strength(left) - strength(right) + side + length * (tokens(left) - tokens(right)) / (tokens of both)

`bad` counts as a tie. A wide normal prior keeps the strengths finite when a model has won, or lost, all its votes.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from pairtune.run.records import Interval
from pairtune.statistics import ALPHA, student_quantile
from pairtune.votes.records import Vote

Numbers = NDArray[np.float64]

PRIOR = 3.0  # standard deviation of strengths and effects, in nats: odds of 20 to 1 are nothing unusual
_STEPS, _CLOSE = 50, 1e-9
_RESAMPLES = 400
_EACH = ALPHA / 2  # the two biases hold together with 95 % (Bonferroni)
_POWER = 0.8
_VOTERS_DIFFER = 1.5  # an interval this much wider than the votes themselves explain is due to the voters
_LENGTH, _TIE = -2, -1  # after the models and the side
TWICE = 1 / 3  # the relative difference of lengths where one answer is twice as long


@dataclass(frozen=True)
class Matches:
    """Votes between models, as numbers.

    Attributes:
        models: the models, by their weights (`records.VotedAnswer.weights`).
        left, right: positions in `models`, [votes] each.
        outcome: 0 left, 1 tie (or both bad), 2 right, [votes].
        longer: relative difference of the lengths, left minus right over both, [votes].
        voter: the voter of each vote as a number, [votes].
        drawn: whether lots were drawn which answer stands on the left, as in the arena, [votes].
    """

    models: list[str]
    left: NDArray[np.int64]
    right: NDArray[np.int64]
    outcome: NDArray[np.int64]
    longer: Numbers
    voter: NDArray[np.int64]
    drawn: NDArray[np.bool_]

    @classmethod
    def of(cls, votes: Sequence[Vote]) -> Matches:
        """The standing votes that compare two models."""
        counted = [vote for vote in votes if vote.compares and vote.withdrawn is None]
        models = sorted({answer.weights for vote in counted for answer in vote.answers})
        place = {model: number for number, model in enumerate(models)}
        voters = {voter: number for number, voter in enumerate(dict.fromkeys(vote.voter for vote in counted))}
        codes = {"left": 0, "tie": 1, "bad": 1, "right": 2}
        return cls(
            models,
            np.array([place[vote.answers[0].weights] for vote in counted], np.int64),
            np.array([place[vote.answers[1].weights] for vote in counted], np.int64),
            np.array([codes[vote.outcome] for vote in counted], np.int64),
            np.array([_longer(vote) for vote in counted], np.float64),
            np.array([voters[vote.voter] for vote in counted], np.int64),
            np.array([vote.kind == "arena" for vote in counted], np.bool_),
        )

    def __len__(self) -> int:
        return len(self.left)

    @property
    def design(self) -> Numbers:
        """What d depends on: the models (+1 left, -1 right), side and length, [votes, models + 2]."""
        found = np.zeros((len(self), len(self.models) + 2))
        rows = np.arange(len(self))
        found[rows, self.left] += 1
        found[rows, self.right] -= 1
        found[:, -2], found[:, -1] = 1, self.longer
        return found


def _longer(vote: Vote) -> float:
    left, right = (answer.tokens or len(answer.text) for answer in vote.answers)
    return (left - right) / (left + right) if left + right else 0.0


@dataclass(frozen=True)
class Fit:
    """The most probable parameters, and how certain they are.

    Attributes:
        values: strengths of the models (their mean is 0), side, length and the log of the weight of ties.
        covariance: of these, from the curvature of the log posterior, [parameters, parameters].
    """

    values: Numbers
    covariance: Numbers

    @property
    def tie(self) -> float:
        """The log of the weight of ties."""
        return float(self.values[_TIE])

    def variance(self, one: int, other: int) -> float:
        """The variance of the difference of two models' strengths."""
        c = self.covariance
        return float(c[one, one] + c[other, other] - 2 * c[one, other])


def fit(matches: Matches, weights: Numbers | None = None, start: Numbers | None = None) -> Fit:
    """Fit the model by Newton's method; the log posterior is concave, so there is one maximum.

    Args:
        matches: the votes.
        weights: how often each vote counts, [votes]; by default once.
        start: where to begin.
    """
    design = matches.design
    models, size = len(matches.models), design.shape[1] + 1
    values = np.zeros(size) if start is None else start.copy()
    counts = np.ones(len(matches)) if weights is None else weights
    ahead, ties = (1 - matches.outcome) / 2, matches.outcome == 1  # 1/2, 0 or -1/2
    curvature = np.eye(size) / PRIOR**2
    for _ in range(_STEPS):
        half = design @ values[:-1] / 2
        shares = _shares(np.stack([half, np.full_like(half, values[-1]), -half], 1))
        middle, even = (shares[:, 0] - shares[:, 2]) / 2, shares[:, 1]
        gradient = np.append(design.T @ (counts * (ahead - middle)), counts @ (ties - even)) - values / PRIOR**2
        curvature = np.eye(size) / PRIOR**2
        curvature[:-1, :-1] += (design.T * (counts * ((1 - even) / 4 - middle**2))) @ design
        curvature[:-1, -1] -= design.T @ (counts * middle * even)
        curvature[-1, :-1] = curvature[:-1, -1]
        curvature[-1, -1] += counts @ (even * (1 - even))
        step = np.linalg.solve(curvature, gradient)
        largest = np.abs(step).max()
        values = values + step * min(1.0, 2 / max(largest, 1e-12))  # longer steps may overshoot where votes are few
        if largest < _CLOSE:
            break
    values[:models] -= values[:models].mean() if models else 0.0
    return Fit(np.asarray(values, np.float64), np.asarray(np.linalg.inv(curvature), np.float64))


def _shares(utilities: Numbers) -> Numbers:
    raised = np.exp(utilities - utilities.max(-1, keepdims=True))
    return np.asarray(raised / raised.sum(-1, keepdims=True), np.float64)


def chances(ahead: float, tie: float) -> tuple[float, float, float]:
    """The chances of left, tie and right for a left answer that is `ahead`; `tie` is the log of the weight of ties."""
    left, even, right = _shares(np.array([ahead / 2, tie, -ahead / 2])).tolist()
    return left, even, right


@dataclass(frozen=True)
class Standing:
    """One model in the standings.

    Attributes:
        model: its name; with the end of its fingerprint, if other weights have had the same name.
        weights: its fingerprint.
        strength: in nats; differences count, and the mean over models is 0.
        interval: 95 %.
        wins, losses, ties, bad: its votes by outcome.
        rank: by strength, 1 for the first.
        apart: whether it can be told from the model below it.
        needed: about how many more votes between the two would tell them apart; None if they are told apart, or if more
            people are needed rather than more votes.
    """

    model: str
    weights: str
    strength: float
    interval: Interval
    wins: int
    losses: int
    ties: int
    bad: int
    rank: int
    apart: bool = False
    needed: int | None = None


@dataclass(frozen=True)
class Effect:
    """How votes are biased, as the chance of one choice minus that of the other, all else being equal."""

    share: float
    interval: Interval

    @property
    def shows(self) -> bool:
        """Whether the interval excludes 0."""
        return not self.interval[0] <= 0 <= self.interval[1]


@dataclass(frozen=True)
class Agreement:
    """How often voters agree: the share of votes on the same two answers that have the same outcome, over all pairs."""

    share: float
    pairs: int


@dataclass(frozen=True)
class Standings:
    """What all votes come to.

    Attributes:
        models: the strongest first.
        votes: the number of votes that compare models and stand.
        voters: how many people gave them.
        side: how much more often the left answer is chosen than the right one, in votes whose sides were drawn.
        length: how much more often an answer twice as long is chosen than the other one. The intervals of the two hold
            together with 95 %.
        agreement: None if no two people voted on the same answers.
    """

    models: list[Standing]
    votes: int
    voters: int
    side: Effect
    length: Effect
    agreement: Agreement | None = None


def standings(votes: Sequence[Vote], seed: int = 0) -> Standings | None:
    """The standings; None if no vote compares two models.

    Intervals are those of a bootstrap over voters, since one person's votes say less than as many people's; they are
    widened to those of the fit itself, which are wider when few people have voted.

    Args:
        votes: all votes; those withdrawn and thumbs are left out.
        seed: of the bootstrap.
    """
    matches = Matches.of(votes)
    if not len(matches):
        return None
    found = fit(matches)
    resampled = _resampled(matches, seed)
    draws = np.array([fit(matches, each, found.values).values for each in resampled])
    freedom = len(np.unique(matches.voter)) - 1
    places = range(len(matches.models))
    order = sorted(places, key=lambda place: -found.values[place])
    tallies, names = _tallies(votes), _names(votes)
    models = []
    for rank, place in enumerate(order, 1):
        weights = matches.models[place]
        tally = tallies[weights]
        spread = math.sqrt(max(0.0, _centred(found.covariance, len(matches.models))[place, place]))
        interval = _interval(found.values[place], draws[:, place], spread, freedom)
        below = order[rank] if rank < len(order) else None
        apart, needed = False, None
        if below is not None:
            apart, needed = _told_apart(matches, found, draws, place, below, freedom)
        models.append(
            Standing(
                model=names[weights],
                weights=weights,
                strength=float(found.values[place]),
                interval=interval,
                wins=tally["wins"],
                losses=tally["losses"],
                ties=tally["ties"],
                bad=tally["bad"],
                rank=rank,
                apart=apart,
                needed=needed,
            )
        )
    return Standings(
        models,
        len(matches),
        len(np.unique(matches.voter)),
        _side(matches, resampled),
        _length(matches, found, draws, freedom),
        agreement(votes),
    )


def _names(votes: Sequence[Vote]) -> dict[str, str]:
    """What each model is called: its last name, told apart where others have had it too."""
    last = {answer.weights: answer.model for vote in votes for answer in vote.answers}
    shared = Counter(last.values())
    return {weights: f"{name} ({weights[-6:]})" if shared[name] > 1 else name for weights, name in last.items()}


def _tallies(votes: Sequence[Vote]) -> dict[str, Counter[str]]:
    tallies: dict[str, Counter[str]] = defaultdict(Counter)
    for vote in votes:
        if not vote.compares or vote.withdrawn is not None:
            continue
        for answer, side in zip(vote.answers, ("left", "right"), strict=True):
            kind = {"tie": "ties", "bad": "bad"}.get(vote.outcome, "wins" if vote.outcome == side else "losses")
            tallies[answer.weights][kind] += 1
    return tallies


def _resampled(matches: Matches, seed: int) -> Numbers:
    """How often each vote counts in resamples of the voters, [resamples, votes]; of one voter, of the votes."""
    generator = np.random.default_rng(seed)
    voters, member = np.unique(matches.voter, return_inverse=True)
    if len(voters) == 1:
        member = np.arange(len(matches))
    count = int(member.max()) + 1
    drawn = generator.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
    return drawn[:, member].astype(np.float64)


def _centred(covariance: Numbers, models: int) -> Numbers:
    """The covariance of the strengths minus their mean."""
    middle = np.eye(models) - 1 / models
    return np.asarray(middle @ covariance[:models, :models] @ middle)


def _interval(value: float, draws: Numbers, spread: float, freedom: int, alpha: float = ALPHA) -> Interval:
    """The wider of the bootstrap's quantiles, Student's t around the bootstrap's spread, and the fit's own interval."""
    half = NormalDist().inv_cdf(1 - alpha / 2) * spread
    if freedom:  # else one voter, whose votes were resampled
        half = max(half, student_quantile(freedom, alpha) * draws.std(ddof=1))
    low, high = np.quantile(draws, [alpha / 2, 1 - alpha / 2])
    return float(min(low, value - half)), float(max(high, value + half))


def _told_apart(
    matches: Matches, found: Fit, draws: Numbers, one: int, other: int, freedom: int
) -> tuple[bool, int | None]:
    """Whether two models are told apart, and else how many more votes between them would (power 80 %), if votes do."""
    gap = float(found.values[one] - found.values[other])
    spread = math.sqrt(max(0.0, found.variance(one, other)))
    low, high = _interval(gap, draws[:, one] - draws[:, other], spread, freedom)
    if not low <= 0 <= high:
        return True, None
    if gap == 0 or (high - low) / 2 > _VOTERS_DIFFER * NormalDist().inv_cdf(1 - ALPHA / 2) * spread:
        return False, None  # more votes of people who differ so much would not tell
    wanted = (NormalDist().inv_cdf(1 - ALPHA / 2) + NormalDist().inv_cdf(_POWER)) / abs(gap)
    more = (wanted**2 - 1 / max(spread**2, 1e-12)) / information(gap, found.tie)
    return False, max(1, math.ceil(more))


def information(ahead: float, tie: float) -> float:
    """Fisher's information of one vote about the difference of two strengths."""
    left, _, right = chances(ahead, tie)
    return (left + right - (left - right) ** 2) / 4


def _side(matches: Matches, weights: Numbers) -> Effect:
    """Where sides are drawn by lot, what models and lengths do cancels out in the mean, whatever voters are like."""
    drawn = matches.drawn
    if not drawn.any():
        return Effect(0.0, (-1.0, 1.0))
    chosen, weights = 1.0 - matches.outcome[drawn], weights[:, drawn]  # 1, 0 or -1
    # As if two more votes had been given, one each way: a few votes that agree are not certain.
    spread = math.sqrt((chosen.std() ** 2 * len(chosen) + 2) / (len(chosen) + 2)) / math.sqrt(len(chosen))
    totals = weights.sum(1)
    draws = (weights @ chosen)[totals > 0] / totals[totals > 0]
    freedom = len(np.unique(matches.voter[drawn])) - 1
    return Effect(float(chosen.mean()), _as_share(_interval(chosen.mean(), draws, spread, freedom, _EACH)))


def _length(matches: Matches, found: Fit, draws: Numbers, freedom: int) -> Effect:
    """The mean over all votes, which is less sensitive than the parameter to voters who choose by lot."""
    value = _lead_by_length(matches, found.values)
    spread = abs(_lead_by_length(matches, found.values + _unit(_LENGTH, found)) - value)
    of_draws = np.array([_lead_by_length(matches, each) for each in draws])
    return Effect(value, _as_share(_interval(value, of_draws, spread, freedom, _EACH)))


def _as_share(interval: Interval) -> Interval:
    """An interval of a difference of two chances, which is between -1 and 1."""
    return max(-1.0, interval[0]), min(1.0, interval[1])


def _unit(column: int, found: Fit) -> Numbers:
    """A change of one parameter by its standard deviation."""
    changed = np.zeros_like(found.values)
    changed[column] = math.sqrt(found.covariance[column, column])
    return changed


def _lead_by_length(matches: Matches, values: Numbers) -> float:
    """How much more often an answer is chosen than the other one if it is twice as long, in the mean over votes."""
    models = len(matches.models)
    ahead = matches.design[:, :models] @ values[:models]
    leads = []
    for sign in (1, -1):
        half = (ahead + sign * values[_LENGTH] * TWICE) / 2
        shares = _shares(np.stack([half, np.full_like(half, values[_TIE]), -half], 1))
        leads.append((shares[:, 0] - shares[:, 2]).mean())
    return float(leads[0] - leads[1]) / 2


def agreement(votes: Sequence[Vote]) -> Agreement | None:
    """How often two people who voted on the same two answers chose the same; None if nobody did."""
    by_answers: dict[tuple[str, frozenset[str]], list[tuple[str, str]]] = defaultdict(list)
    for vote in votes:
        if len(vote.answers) == 2 and vote.withdrawn is None:
            texts = [answer.text for answer in vote.answers]
            chosen = {"left": texts[0], "right": texts[1]}.get(vote.outcome, vote.outcome)
            by_answers[str(vote.prompt), frozenset(texts)].append((vote.voter, chosen))
    same = pairs = 0
    for given in by_answers.values():
        for at, (voter, chosen) in enumerate(given):
            for other, theirs in given[:at]:
                if voter != other:
                    pairs += 1
                    same += chosen == theirs
    return Agreement(same / pairs, pairs) if pairs else None
