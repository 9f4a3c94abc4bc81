"""The statistics of experiments against scipy, published examples and simulated runs."""

import numpy as np
import pytest
from scipy import stats

from launch.comparison import statistics

SIMULATIONS = 2000


def simulated_ends(generator: np.random.Generator, runs: tuple[int, ...]) -> np.ndarray:
    """Each run's mean over its last 100 steps, whose noise is strongly correlated (AR(1))."""
    noise = np.zeros(runs)
    total = np.zeros(runs)
    for _ in range(100):
        noise = 0.95 * noise + generator.normal(0, 0.01, runs)
        total += noise
    return generator.normal(0, 0.02, runs) + total / 100  # a run's own luck, then its steps'


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_two_arms_that_do_not_differ_are_seldom_told_apart(seeds):
    """At most 6 % false alarms at 5 %, and the interval holds the truth as often as it says."""
    generator = np.random.default_rng(seeds)
    common = generator.normal(0, 0.1, (SIMULATIONS, seeds))  # a seed's own part pairs away
    arms = [common + simulated_ends(generator, (SIMULATIONS, seeds)) for _ in range(2)]
    found = [statistics.over_seeds(row) for row in arms[1] - arms[0]]
    assert np.mean([one.p < statistics.LEVEL for one in found]) <= 0.06
    assert np.mean([one.low <= 0 <= one.high for one in found]) >= 0.94


def test_difference_is_the_paired_t_test_of_scipy():
    one, two = np.random.default_rng(1).normal(4, 0.1, (2, 8))
    found = statistics.over_seeds(two - one)
    theirs = stats.ttest_rel(two, one)
    interval = theirs.confidence_interval()
    assert found.p == pytest.approx(theirs.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_equivalence_is_the_worse_of_two_one_sided_tests():
    values = np.random.default_rng(2).normal(0.002, 0.004, 8)
    lower = stats.ttest_1samp(values, -0.01, alternative="greater").pvalue
    upper = stats.ttest_1samp(values, 0.01, alternative="less").pvalue
    assert statistics.equivalence(statistics.over_seeds(values), 0.01) == pytest.approx(
        max(lower, upper)
    )


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_what_is_called_detectable_is_found_four_times_in_five(seeds):
    size = statistics.detectable(0.006, seeds)
    generator = np.random.default_rng(seeds)
    values = generator.normal(size, 0.006, (SIMULATIONS, seeds))
    found = stats.ttest_1samp(values, 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.03)
    assert statistics.power(size, 0.006, seeds) == pytest.approx(0.8, abs=1e-6)


def test_holm_by_hand():
    """0.005 x 4, 0.01 x 3, 0.03 x 2; 0.04 x 1 may not fall below the one before it."""
    adjusted = statistics.holm([0.01, 0.04, None, 0.03, 0.005])
    assert adjusted == [pytest.approx(0.03), pytest.approx(0.06), None, pytest.approx(0.06), 0.02]
    assert statistics.holm([0.6, 0.7]) == [1.0, 1.0]


def test_one_seed_has_no_interval_and_no_verdict():
    found = statistics.over_seeds([-0.3])
    assert (found.low, found.high, found.p, found.deviation) == (None, None, None, None)
    assert "one seed, no interval" in str(found)
    assert "nothing can be said" in statistics.verdict(found, None, 0.01)
    assert statistics.detectable(0.01, 1) is None
    with pytest.raises(ValueError, match="no pair of runs"):
        statistics.over_seeds([])


def test_verdicts():
    generator = np.random.default_rng(0)
    for mean, margin, words in (
        (-0.05, 0.01, "lower"),
        (0.05, 0.01, "higher"),
        (0.004, 0.05, "higher, by less than what matters"),
        (0.0, 0.05, "no difference that matters"),
        (0.0, 0.0005, "undecided"),
    ):
        values = generator.normal(0, 0.002, 8)
        found = statistics.over_seeds(values - values.mean() + mean)
        assert statistics.verdict(found, found.p, margin) == words


def test_items_and_seeds_together():
    """Three seeds, 60 items, both with effects of their own: the truth is inside 95 % or more."""
    generator = np.random.default_rng(4)
    hits, narrow = 0, 0
    for _ in range(300):
        table = (
            generator.normal(0, 0.1, (3, 1))
            + generator.normal(0, 0.3, (1, 60))
            + generator.normal(0, 0.3, (3, 60))
        )
        both = statistics.over_seeds_and_items(table)
        items = statistics.over_items(table[0])
        hits += both["low"] <= 0 <= both["high"]
        narrow += items["low"] <= 0 <= items["high"]
    assert hits >= 0.93 * 300
    assert narrow < 0.9 * 300  # of one seed's items alone: it speaks of other items, not seeds
    with pytest.raises(ValueError, match="two seeds"):
        statistics.over_seeds_and_items(np.zeros((1, 5)))
