"""What held-out pairs can tell: intervals for means, and tests of whether two trials differ.

All of it rests on per-example numbers of the same pairs in the same order, so that what makes a pair hard for every
trial cancels out. The unit is the pair: epochs and seeds are not sampled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

# Half of this is the rate at which a test without any difference is wrong to either side.
ALPHA = 0.05
_RESAMPLES = 2_000
_FLIPS = 20_000
# Rows of random numbers at a time, so that memory stays at tens of megabytes.
_BLOCK = 4_000_000


def bootstrap_intervals(values: Numbers, seed: int = 0) -> Numbers:
    """95 % percentile bootstrap intervals of column means (Efron 1979).

    Args:
        values: [pairs, metrics].
        seed: of the resampling.

    Returns:
        [metrics, 2]: low and high.
    """
    generator, pairs = np.random.default_rng(seed), len(values)
    chances = np.full(pairs, 1 / pairs)
    means = [generator.multinomial(pairs, chances, size=rows) @ values / pairs for rows in _blocks(_RESAMPLES, pairs)]
    ends = np.quantile(np.concatenate(means), [ALPHA / 2, 1 - ALPHA / 2], axis=0)
    return np.ascontiguousarray(ends.T)


def paired_p_values(differences: Numbers, seed: int = 0) -> Numbers:
    """Two-sided p-values of sign-flip permutation tests (Fisher 1935): is the mean of a column 0?

    Without a difference between two trials it is a coin toss for each pair which of them is ahead, so the mean is
    compared with the means under random signs. Exact in size for symmetric differences, whatever their distribution.

    Args:
        differences: [pairs, comparisons].
        seed: of the signs.

    Returns:
        [comparisons].
    """
    generator, pairs = np.random.default_rng(seed), len(differences)
    found = np.abs(differences.sum(0))
    room = 1e-9 * np.abs(differences).sum(0)  # sums of the same numbers in another order
    as_large = np.zeros(differences.shape[1])
    for rows in _blocks(_FLIPS, pairs):
        signs = generator.integers(0, 2, size=(rows, pairs), dtype=np.int8).astype(np.float64) * 2 - 1
        as_large += (np.abs(signs @ differences) >= found - room).sum(0)
    return (1 + as_large) / (1 + _FLIPS)


def holm(p_values: Numbers) -> Numbers:
    """P-values corrected for their number (Holm 1979): the chance of even one false alarm stays below ALPHA."""
    order, count = np.argsort(p_values), len(p_values)
    stepped = np.maximum.accumulate(p_values[order] * np.arange(count, 0, -1))
    corrected = np.empty(count)
    corrected[order] = np.minimum(stepped, 1)
    return corrected


def compare_all(values: Numbers, seed: int = 0) -> dict[tuple[int, int], float]:
    """Corrected p-values of every two columns of [pairs, trials]: of all, since the best was picked for its numbers."""
    two = list(combinations(range(values.shape[1]), 2))
    if not two:
        return {}
    differences = np.stack([values[:, one] - values[:, other] for one, other in two], axis=1)
    corrected = holm(paired_p_values(differences, seed))
    return dict(zip(two, map(float, corrected), strict=True))


def pairs_needed(difference: Numbers, comparisons: int) -> int | None:
    """How many pairs would show a difference like this one with a chance of 80 %; None: no number would.

    The usual normal approximation for a paired comparison, at ALPHA divided by the number of comparisons.
    """
    mean, spread = float(difference.mean()), float(difference.std(ddof=1)) if len(difference) > 1 else 0.0
    if mean == 0 or spread == 0:
        return None
    normal = NormalDist()
    quantiles = normal.inv_cdf(1 - ALPHA / 2 / max(1, comparisons)) + normal.inv_cdf(0.8)
    return math.ceil((quantiles * spread / mean) ** 2)


def _blocks(rows: int, columns: int) -> Iterator[int]:
    """Numbers of rows that add up to `rows`."""
    at_once = max(1, _BLOCK // columns)
    while rows > 0:
        yield min(rows, at_once)
        rows -= at_once


def share_interval(count: float, total: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): honest for few cases and near 0 and 1. `count` may hold halves."""
    if not total:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(1 - ALPHA / 2)
    share, room = min(max(count / total, 0.0), 1.0), z * z / total
    centre = (share + room / 2) / (1 + room)
    half = z / (1 + room) * math.sqrt(share * (1 - share) / total + room / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)
