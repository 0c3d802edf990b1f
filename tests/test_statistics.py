"""Intervals and tests keep what they promise: by hand, and over many simulated grids."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from pairtune.statistics import ALPHA, bootstrap_intervals, compare_all, holm, paired_p_values, pairs_needed


def test_an_interval_by_hand():
    """The mean of four tosses of which one is 1 is, resampled, Binomial(4, 1/4) / 4: 2.5 % and 97.5 % are 0 and 3/4."""
    (interval,) = bootstrap_intervals(np.array([[0.0], [0.0], [0.0], [1.0]]))
    assert interval.tolist() == [0.0, 0.75]


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Of 400 intervals at 95 % between 91 and 98 % hold the mean: by chance another share in about 1 of 1,000 runs."""
    generator = np.random.default_rng(1)
    samples = generator.exponential(size=(120, 400))  # skewed, mean 1
    low, high = bootstrap_intervals(samples).T
    assert 0.91 <= ((low <= 1) & (high >= 1)).mean() <= 0.98


def test_a_sign_flip_test_by_hand():
    """Of the 2^6 signs of 1..6 four reach a sum of 19 or -19: those with sums 21 and 19 and their mirrors."""
    values = np.arange(1.0, 7)
    sums = [abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in product((1, -1), repeat=6)]
    exact = sum(total >= 19 for total in sums) / 64
    assert exact == 4 / 64
    (p_value,) = paired_p_values((values * np.array([-1, 1, 1, 1, 1, 1]))[:, None])
    assert p_value == pytest.approx(exact, abs=0.006)  # three standard deviations of 20,000 draws


def test_no_difference_is_no_evidence():
    assert paired_p_values(np.zeros((50, 2))).tolist() == [1.0, 1.0]


def test_holm_by_hand():
    assert holm(np.array([0.04, 0.01, 0.03])).tolist() == pytest.approx([0.06, 0.03, 0.06])
    assert holm(np.array([0.5, 0.9])).tolist() == [1.0, 1.0]


def simulated(generator, trials=4, pairs=64, epochs=3, better=0.0):
    """A grid's losses at each trial's best epoch: pairs are hard for all trials; the first one may be better."""
    hard = generator.gamma(2, 0.3, size=(pairs, 1, 1))
    own = generator.normal(0, 0.1, size=(pairs, trials, 1))
    losses = hard + own + generator.normal(0, 0.03, size=(pairs, trials, epochs))
    losses[:, 0] -= better
    return np.take_along_axis(losses, losses.mean(0).argmin(1)[None, :, None], axis=2)[:, :, 0]


def test_grids_of_equal_trials_raise_a_false_alarm_in_at_most_one_of_twenty():
    """Of 200 grids; at a true rate of 5 % more than 20 alarms come in 1 of 1,000 such tests (binomial)."""
    generator = np.random.default_rng(2)
    alarms = sum(min(compare_all(simulated(generator)).values()) < ALPHA for _ in range(200))
    assert alarms <= 20
    assert alarms / 200 <= ALPHA, "with this seed"


def test_a_truly_better_trial_is_nearly_always_found():
    """0.08 nats are 4.5 standard errors of a difference (0.14 / sqrt(64)): missed in fewer than 1 of 20 grids."""
    generator = np.random.default_rng(3)
    found = 0
    for _ in range(40):
        p_values = compare_all(simulated(generator, better=0.08))
        found += all(p_values[0, other] < ALPHA for other in (1, 2, 3))
    assert found >= 34


def test_the_number_of_pairs_that_is_named_is_the_one_that_settles():
    """With as many pairs as named for one comparison the test finds the difference in about 80 % of 200 samples."""
    generator = np.random.default_rng(4)
    needed = pairs_needed(np.tile([1.1, -0.9], 50_000), 1)
    assert needed == pytest.approx(785, abs=2)  # ((1.960 + 0.842) / 0.1)^2
    found = paired_p_values(generator.normal(0.1, 1.0, size=(needed, 200))) < ALPHA
    assert 0.7 <= found.mean() <= 0.9  # 3.5 standard deviations of 200 tosses
