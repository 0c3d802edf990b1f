"""Statistics of held-out pairs: intervals for means, and tests of whether two trials differ.

All of them use per-example metrics of the same pairs in the same order, so that a pair's difficulty, which all trials
share, cancels out. The unit is the conversation: pairs whose prompts belong together (`data.splits.group_prompts`) are
resampled together and change their signs together (Miller 2024, "Adding Error Bars to Evals"). The variance over epochs
and seeds is not covered.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from pairtune.run.examples import contributions
from pairtune.run.metrics import EXAMPLE_METRICS, evaluation_name
from pairtune.run.records import Interval, Share

Numbers = NDArray[np.float64]
Groups = NDArray[np.int64]

# Significance level, two-sided.
ALPHA = 0.05
_RESAMPLES = 2_000
_FLIPS = 20_000
# Random numbers drawn at a time, so that memory stays at tens of megabytes.
_BLOCK = 4_000_000


def bootstrap_intervals(values: Numbers, groups: Groups | None = None, seed: int = 0) -> Numbers:
    """95 % intervals of column means: a cluster bootstrap, widened to Student's t where that is wider.

    Groups are resampled whole (Cameron, Gelbach and Miller 2008, "Bootstrap-Based Improvements for Inference with
    Clustered Errors"), since pairs of one conversation carry less information than as many pairs of different ones. The
    percentile bootstrap is too narrow for few values (coverage 83 % for five normal values, 89 % for ten), so its ends
    are moved out to those of Student's t over groups, corrected for skewness (Johnson 1978, "Modified t Tests and
    Confidence Intervals for Asymmetrical Populations"): coverage is 95 to 97 % for normal values, and at least 92 % for
    skewed ones (`tests/test_statistics.py`).

    Args:
        values: [pairs, metrics].
        groups: the group of each pair, [pairs]; by default each pair is its own group.
        seed: seed of the resampling.

    Returns:
        [metrics, 2]: low and high. With a single group, which shows no spread, both are its mean.
    """
    sums, sizes = _by_group(values, groups)
    generator, count = np.random.default_rng(seed), len(sizes)
    chances = np.full(count, 1 / count)
    means = []
    for rows in _blocks(_RESAMPLES, count):
        drawn = generator.multinomial(count, chances, size=rows)
        means.append((drawn @ sums) / (drawn @ sizes)[:, None])
    ends = np.quantile(np.concatenate(means), [ALPHA / 2, 1 - ALPHA / 2], axis=0)
    if count > 1:
        low, high = _student_ends(sums, sizes)
        ends = np.stack([np.minimum(ends[0], low), np.maximum(ends[1], high)])
    return np.ascontiguousarray(ends.T)


def _student_ends(sums: Numbers, sizes: Numbers) -> tuple[Numbers, Numbers]:
    """The ends of Student's t over groups, each moved outwards by Johnson's correction for skewness."""
    count = len(sizes)
    mean = sums.sum(0) / sizes.sum()
    apart = (sums - sizes[:, None] * mean) * count / sizes.sum()  # each group's contribution to the error of the mean
    spread = apart.std(0, ddof=1)
    safe = np.where(spread > 0, spread, 1.0)
    quantile = student_quantile(count - 1)
    skewness = (apart**3).mean(0) / safe**3
    shift = skewness / (6 * math.sqrt(count)) * (1 + 2 * quantile**2)
    error = spread / math.sqrt(count)
    return mean + error * (np.minimum(shift, 0) - quantile), mean + error * (np.maximum(shift, 0) + quantile)


def student_quantile(freedom: int, alpha: float = ALPHA) -> float:
    """The 1 - alpha / 2 quantile of Student's t.

    Exact for one and two degrees of freedom, otherwise the Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5),
    which is 0.4 % low for three and more accurate for more.
    """
    share = 1 - alpha / 2
    if freedom == 1:
        return math.tan(math.pi * (share - 0.5))
    if freedom == 2:
        return (2 * share - 1) / math.sqrt(2 * share * (1 - share))
    z = NormalDist().inv_cdf(share)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92_160,
    )
    return float(z + sum(term / freedom**power for power, term in enumerate(terms, 1)))


def _by_group(values: Numbers, groups: Groups | None) -> tuple[Numbers, Numbers]:
    """Sums over each group, [groups, metrics], and group sizes, [groups]."""
    if groups is None:
        return values, np.ones(len(values))
    _, member = np.unique(groups, return_inverse=True)
    sizes = np.bincount(member).astype(np.float64)
    sums = np.zeros((len(sizes), values.shape[1]))
    np.add.at(sums, member, values)
    return sums, sizes


def metric_intervals(metrics: Numbers, groups: Groups | None = None, cases: int | None = None) -> dict[str, Interval]:
    """95 % intervals of the means over pairs, by metric name.

    Args:
        metrics: [pairs, EXAMPLE_METRICS]; of single answers, their `contributions`.
        groups: the group of each pair, [pairs].
        cases: of single answers, the number of those of the rarer kind.
    """
    intervals = bootstrap_intervals(metrics, groups)
    accuracy = EXAMPLE_METRICS.index("rewards/accuracies")
    right = metrics[:, accuracy]
    if cases is None:
        effect = design_effect(right, groups)
        intervals[accuracy] = share_interval(right.sum() / effect, len(right) / effect)  # 5 of 5 is not certainty
    else:
        intervals[accuracy] = _area_interval(right, intervals[accuracy], cases, groups)
    return {
        evaluation_name(name): (float(low), float(high))
        for name, (low, high) in zip(EXAMPLE_METRICS, intervals, strict=True)
    }


def design_effect(values: Numbers, groups: Groups | None) -> float:
    """Design effect (Kish 1965): how many grouped pairs carry the information of one independent pair.

    It lies between 1 and the size of the groups.

    Args:
        values: the value of each pair, [pairs].
        groups: the group of each pair, [pairs].
    """
    sums, sizes = _by_group(values[:, None], groups)
    pairs, count = sizes.sum(), len(sizes)
    most = float((sizes**2).sum() / pairs)
    spread = float(values.var())
    if most == 1 or spread == 0 or count == 1:
        return most  # without variance, assume the worst
    clustered = float(np.square(sums[:, 0] - sizes * values.mean()).sum()) * count / (count - 1) / pairs
    return float(min(max(clustered / spread, 1.0), most))


def paired_p_values(differences: Numbers, groups: Groups | None = None, seed: int = 0) -> Numbers:
    """Two-sided p-values of sign-flip permutation tests (Fisher 1935): is the mean of a column 0?

    If two trials do not differ, the sign of each conversation's difference is a coin toss, so the mean is compared with
    means under random signs. The test has exact size for symmetric differences of any distribution.

    Args:
        differences: [pairs, comparisons].
        groups: the group of each pair, [pairs]; pairs of one group change their signs together. By default each pair
            is its own group.
        seed: seed of the signs.

    Returns:
        [comparisons].
    """
    sums, _ = _by_group(differences, groups)
    generator, count = np.random.default_rng(seed), len(sums)
    found = np.abs(sums.sum(0))
    room = 1e-9 * np.abs(sums).sum(0)  # tolerance for summing in another order
    as_large = np.zeros(sums.shape[1])
    for rows in _blocks(_FLIPS, count):
        signs = generator.integers(0, 2, size=(rows, count), dtype=np.int8).astype(np.float64) * 2 - 1
        as_large += (np.abs(signs @ sums) >= found - room).sum(0)
    return (1 + as_large) / (1 + _FLIPS)


def holm(p_values: Numbers) -> Numbers:
    """P-values corrected for their number (Holm 1979): the family-wise error rate stays below ALPHA."""
    order, count = np.argsort(p_values), len(p_values)
    stepped = np.maximum.accumulate(p_values[order] * np.arange(count, 0, -1))
    corrected = np.empty(count)
    corrected[order] = np.minimum(stepped, 1)
    return corrected


def compare_all(values: Numbers, groups: Groups | None = None, seed: int = 0) -> dict[tuple[int, int], float]:
    """Corrected p-values for all pairs of columns of [pairs, trials], since the best was picked by its metrics."""
    two = list(combinations(range(values.shape[1]), 2))
    if not two:
        return {}
    differences = np.stack([values[:, one] - values[:, other] for one, other in two], axis=1)
    corrected = holm(paired_p_values(differences, groups, seed))
    return dict(zip(two, map(float, corrected), strict=True))


def pairs_needed(
    difference: Numbers, comparisons: int, groups: Groups | None = None, *, settled: bool = True
) -> int | None:
    """How many pairs would show a difference like this one with 80 % power; None if no number would.

    The usual normal approximation for a paired comparison, at ALPHA divided by the number of comparisons, times the
    design effect of the groups. Never fewer than a sign-flip test needs to reach that level at all, and more than these
    pairs if they did not settle it.

    Args:
        difference: difference of two trials for each pair, [pairs].
        comparisons: number of comparisons made at once.
        groups: the group of each pair, [pairs].
        settled: whether these pairs have shown the difference.
    """
    mean, spread = float(difference.mean()), float(difference.std(ddof=1)) if len(difference) > 1 else 0.0
    if mean == 0:
        return None
    alpha, normal = ALPHA / max(1, comparisons), NormalDist()
    quantiles = normal.inv_cdf(1 - alpha / 2) + normal.inv_cdf(0.8)
    needed = math.ceil((quantiles * spread / mean) ** 2 * design_effect(difference, groups))
    size = len(difference) / (len(difference) if groups is None else len(np.unique(groups)))
    fewest = math.ceil((1 + math.log2(1 / alpha)) * size)  # with g groups the smallest p-value is 2 / 2^g
    return max(needed, fewest, 0 if settled else len(difference) + 1)


def _blocks(rows: int, columns: int) -> Iterator[int]:
    """Split `rows` into blocks that fit in memory."""
    at_once = max(1, _BLOCK // columns)
    while rows > 0:
        yield min(rows, at_once)
        rows -= at_once


def share_of(right: Numbers, groups: Groups | None = None) -> Share:
    """The mean of cases that are 1, a half or 0, [cases], with its interval (`share_interval`, by groups)."""
    if not len(right):
        return Share(value=None, interval=share_interval(0, 0), pairs=0)
    effect, count = design_effect(right, groups), float(right.sum())
    interval = share_interval(count / effect, len(right) / effect)
    return Share(value=count / len(right), interval=interval, pairs=len(right))


def within_groups(values: Numbers, desirable: NDArray[np.bool_], groups: Groups) -> Numbers:
    """How often the order of values agrees with the labels, answer by answer.

    Args:
        values: what the answers are ordered by, [answers].
        desirable: whether each should be high, [answers].
        groups: answers are compared within these, [answers].

    Returns:
        For each answer the share of the group's answers of the other kind that are on the right side of it, equal
        values counting half, [answers]; NaN where there are none. In a single group the mean over either kind is the
        area under the ROC curve (Hanley and McNeil 1982).
    """
    shares = np.full(len(values), np.nan)
    order = np.argsort(groups, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        good, bad = rows[desirable[rows]], rows[~desirable[rows]]
        if len(good) and len(bad):
            shares[good] = _below(values[bad], values[good])
            shares[bad] = 1 - _below(values[good], values[bad])
    return shares


def _below(others: Numbers, values: Numbers) -> Numbers:
    """The share of others that each value exceeds, [values]."""
    ordered = np.sort(others)
    left, right = (np.searchsorted(ordered, values, side=side) for side in ("left", "right"))
    return np.asarray((left + right) / 2 / len(ordered))


def _area_interval(shares: Numbers, ends: NDArray[np.float64], cases: int, groups: Groups | None) -> Interval:
    """The interval of an area under the curve: its bootstrap, or without spread that of the rarer kind's answers.

    Its variance is at most that of a share of so many cases (Birnbaum and Klose 1957), which are no more than there are
    groups.
    """
    area, independent = float(shares.mean()), len(shares) if groups is None else len(np.unique(groups))
    if np.ptp(shares) < 1e-12 or independent == 1:
        fewest = min(cases, independent)
        return share_interval(area * fewest, fewest)
    return max(0.0, float(ends[0])), min(1.0, float(ends[1]))


def longer_wins(chosen: NDArray[np.int64], rejected: NDArray[np.int64], groups: Groups | None = None) -> Share:
    """How often the longer answer is the chosen one; answers of equal length count half.

    Of single answers, each desirable one is compared with each undesirable one.

    Args:
        chosen: lengths of the chosen answers, [pairs]; 0 for single undesirable answers.
        rejected: lengths of the rejected answers, [pairs]; 0 for single desirable answers.
        groups: the group of each pair, [pairs].
    """
    desirable = chosen > 0
    if not (desirable & (rejected > 0)).all():
        cases = min(int(desirable.sum()), int((~desirable).sum()))
        if not cases:
            return share_of(np.zeros(0))
        shares = within_groups((chosen + rejected).astype(np.float64), desirable, np.zeros(len(chosen), np.int64))
        shares = contributions(shares, desirable, "mean")
        sums, sizes = _by_group(shares[:, None], groups)
        ends = np.array(_student_ends(sums, sizes))[:, 0] if len(sizes) > 1 else np.zeros(2)
        found = _area_interval(shares, ends, cases, groups)
        return Share(value=float(shares.mean()), interval=found, pairs=len(shares))
    return share_of((chosen > rejected) + (chosen == rejected) / 2, groups)


def share_interval(count: float, total: float) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927), reliable for few cases and near 0 and 1. `count` may include halves.

    For grouped cases, divide both by their `design_effect` first.
    """
    if not total:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(1 - ALPHA / 2)
    share, room = min(max(count / total, 0.0), 1.0), z * z / total
    centre = (share + room / 2) / (1 + room)
    half = z / (1 + room) * math.sqrt(share * (1 - share) / total + room / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)
