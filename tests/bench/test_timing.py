"""The bench's statistics against cases whose answer is known."""

import numpy as np
import pytest

from bench.timing import added, estimate, interleave


def test_contenders_take_turns_in_both_orders():
    calls = []
    taken = interleave({n: lambda n=n: calls.append(n) for n in "ab"}, rounds=4, warmup=1)
    assert calls == list("ab" + "ab" + "ba" + "ab" + "ba")
    assert {name: len(values) for name, values in taken.items()} == {"a": 4, "b": 4}


def test_estimate_of_a_constant_has_no_width():
    result = estimate([3.0] * 10)
    assert (result.median, result.low, result.high) == (3.0, 3.0, 3.0)


def test_the_interval_covers_the_true_median_about_as_often_as_it_says():
    draws = np.random.default_rng(1).lognormal(mean=2.0, size=(200, 31))
    intervals = [estimate(row, resamples=400) for row in draws]
    covered = np.mean([result.low <= np.exp(2.0) <= result.high for result in intervals])
    assert 0.89 < covered <= 0.99


def test_added_time_survives_a_drift_that_plain_medians_do_not():
    """B is 5 % slower than A in every round, while the machine slows down threefold."""
    drift = np.linspace(1, 3, 21)
    taken = {"a": drift, "b": 1.05 * drift}
    assert added(taken, "b", "a").median == pytest.approx(5.0)
