"""Intervals and tests have their nominal properties: by hand, and over many simulated grids."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from pairtune.statistics import (
    ALPHA,
    bootstrap_intervals,
    compare_all,
    design_effect,
    holm,
    paired_p_values,
    pairs_needed,
    student_quantile,
)


def test_an_interval_by_hand():
    """For 0, 0, 0 and 1 the mean is 1/4, its standard error 1/4, t 3.182, and the skewness 3/4 moves the upper end.

    The latter by 3/4 / (6 * 2) * (1 + 2 * 3.182^2) = 1.328 standard errors.
    """
    (interval,) = bootstrap_intervals(np.array([[0.0], [0.0], [0.0], [1.0]]))
    assert interval.tolist() == pytest.approx([0.25 - 3.182 / 4, 0.25 + (3.182 + 1.328) / 4], abs=0.01)


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (1000, 1.962)]
)
def test_students_quantiles_are_those_of_the_tables(freedom, quantile):
    assert student_quantile(freedom) == pytest.approx(quantile, rel=0.005)


DRAWS = {
    "normal": (lambda generator, shape: generator.normal(size=shape), 0.0),
    "skewed": (lambda generator, shape: generator.gamma(4, 1, size=shape), 4.0),
    "log-normal": (lambda generator, shape: generator.lognormal(0, 0.5, size=shape), np.exp(0.125)),
}


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("count", [5, 8, 10, 20, 50, 200])
def test_intervals_cover_the_truth_of_few_values(kind, count):
    """Of 1,500 intervals at 95 %; a true rate of 94 % shows less than 92 % in 1 of 1,000 such tests (binomial)."""
    draw, mean = DRAWS[kind]
    low, high = bootstrap_intervals(draw(np.random.default_rng(count), (count, 1500))).T
    assert 0.92 <= ((low <= mean) & (high >= mean)).mean() <= 0.985


def clustered(generator, groups, size, columns, share=0.9):
    """Pairs whose variance is mostly between conversations."""
    own = generator.normal(size=(groups * size, columns)) * np.sqrt(1 - share)
    return own + np.repeat(generator.normal(size=(groups, columns)), size, axis=0) * np.sqrt(share)


def test_pairs_of_one_conversation_are_not_pairs_of_many():
    """Five pairs of each of 20 conversations: treated as a hundred they alarm in a third of cases, grouped in 5 %."""
    values, groups = clustered(np.random.default_rng(5), 20, 5, 800), np.repeat(np.arange(20), 5)
    naive = (paired_p_values(values) < ALPHA).mean()
    assert naive > 0.3
    assert 0.03 <= (paired_p_values(values, groups) < ALPHA).mean() <= 0.075
    low, high = bootstrap_intervals(values, groups).T
    assert 0.93 <= ((low <= 0) & (high >= 0)).mean() <= 0.98
    low, high = bootstrap_intervals(values).T
    assert ((low <= 0) & (high >= 0)).mean() < 0.75


def test_groups_of_one_are_no_groups():
    values = np.random.default_rng(6).normal(size=(30, 3))
    alone = np.arange(30)[::-1].copy()
    assert bootstrap_intervals(values, np.arange(30)).tolist() == bootstrap_intervals(values).tolist()
    assert paired_p_values(values[::-1], alone).tolist() == paired_p_values(values).tolist()
    assert design_effect(values[:, 0], alone) == 1


def test_a_design_effect_by_hand():
    """Copies of a pair add no information; four of each need four times as many, three and one 2.5 times."""
    values = np.repeat([1.0, 3.0, 2.0, 5.0], 4)
    assert design_effect(values, np.repeat([0, 1, 2, 3], 4)) == 4
    assert design_effect(np.ones(4), np.array([0, 0, 0, 1])) == (9 + 1) / 4
    assert design_effect(values, None) == 1


def test_five_of_five_are_not_said_to_need_one_pair():
    """All five differences have one sign, so p = 2 / 32 at least: six pairs could settle it, one could not."""
    difference = np.array([1.0, 1.1, 0.9, 1.0, 1.05])
    (p_value,) = paired_p_values(difference[:, None])
    assert p_value == pytest.approx(2 / 32, abs=0.006)
    assert pairs_needed(difference, 1, settled=False) == 6
    assert pairs_needed(difference, 6, settled=False) == 8  # 2 / 2^8 is the first below 0.05 / 6
    assert pairs_needed(np.repeat(difference, 2), 1, np.repeat(np.arange(5), 2), settled=False) == 11
    assert pairs_needed(np.zeros(5), 1, settled=False) is None


def test_a_sign_flip_test_by_hand():
    """Of the 2^6 sign patterns of 1..6, four reach a sum of 19 or -19: those with sums 21 and 19 and their mirrors."""
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
    """A grid's losses at each trial's best epoch: difficulty is shared by all trials; the first may be better."""
    hard = generator.gamma(2, 0.3, size=(pairs, 1, 1))
    own = generator.normal(0, 0.1, size=(pairs, trials, 1))
    losses = hard + own + generator.normal(0, 0.03, size=(pairs, trials, epochs))
    losses[:, 0] -= better
    return np.take_along_axis(losses, losses.mean(0).argmin(1)[None, :, None], axis=2)[:, :, 0]


def test_grids_of_equal_trials_raise_a_false_alarm_in_at_most_one_of_twenty():
    """200 grids; at a true rate of 5 %, more than 20 alarms occur in 1 of 1,000 such tests (binomial)."""
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
    """With the stated number of pairs for one comparison, the test finds it in about 80 % of 200 samples."""
    generator = np.random.default_rng(4)
    needed = pairs_needed(np.tile([1.1, -0.9], 50_000), 1)
    assert needed == pytest.approx(785, abs=2)  # ((1.960 + 0.842) / 0.1)^2
    found = paired_p_values(generator.normal(0.1, 1.0, size=(needed, 200))) < ALPHA
    assert 0.7 <= found.mean() <= 0.9  # 3.5 standard deviations of 200 tosses
