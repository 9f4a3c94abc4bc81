"""What may be concluded from runs. The unit is the run, and runs of one seed pair.

Steps of one run are no sample of anything: their noise is correlated, and another seed would move
all of them together. So whatever is said of a method is said from one number a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
from scipy import optimize, stats

LEVEL = 0.05
POWER = 0.8
RESAMPLES = 2000


@dataclass(frozen=True)
class Difference:
    """Paired differences over seeds, and what they can tell.

    Attributes:
        values: one difference a seed.
        mean, deviation: their mean and sample standard deviation (None of a single seed).
        low, high: the 95 % t-interval of the mean (None of a single seed).
        p: of the two-sided t-test against no difference (None of a single seed).
        detectable: the smallest difference that this many seeds of this deviation find at 5 %
            with a probability of 80 %.
    """

    values: list[float]
    mean: float
    deviation: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    detectable: float | None = None

    @property
    def seeds(self) -> int:
        return len(self.values)

    def __str__(self) -> str:
        told = interval(asdict(self))
        return told if self.low is None else f"{told}, {self.seeds} seeds"


def interval(told: Mapping[str, Any], form: str = "+.4f", scale: float = 1) -> str:
    """A mean with its 95 % interval, of anything here as a dict: -0.0300 [-0.0400, -0.0200]."""
    if told["low"] is None:
        return f"{scale * told['mean']:{form}} (one seed, no interval)"
    mean, low, high = (scale * told[key] for key in ("mean", "low", "high"))
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def over_seeds(values: Sequence[float] | np.ndarray) -> Difference:
    """The paired differences of one comparison, one a seed.

    Raises:
        ValueError: there are none.
    """
    if not len(values):
        raise ValueError("no pair of runs shares a seed: there is no difference to tell")
    found = [float(value) for value in values]
    mean = float(np.mean(found))
    if len(found) == 1:
        return Difference(found, mean)
    deviation = float(np.std(found, ddof=1))
    error = deviation / len(found) ** 0.5
    reach = float(stats.t.ppf(1 - LEVEL / 2, len(found) - 1)) * error
    return Difference(
        found,
        mean,
        deviation,
        mean - reach,
        mean + reach,
        two_sided(mean, error, len(found) - 1),
        detectable(deviation, len(found)),
    )


def two_sided(mean: float, error: float, freedom: int) -> float:
    """p of a t-test against 0; differences that are all the same leave no doubt either way."""
    if error == 0:
        return float(mean == 0)
    return float(2 * stats.t.sf(abs(mean) / error, freedom))


def equivalence(difference: Difference, margin: float) -> float | None:
    """p of the claim that the true difference lies within +-margin (two one-sided t-tests)."""
    if difference.deviation is None:
        return None
    error = difference.deviation / difference.seeds**0.5
    distance = margin - abs(difference.mean)  # to the nearer bound, whose test decides
    if error == 0:
        return float(distance <= 0)
    return float(stats.t.sf(distance / error, difference.seeds - 1))


def power(difference: float, deviation: float, seeds: int) -> float:
    """How often the paired t-test at 5 % finds a true `difference` (either sign)."""
    critical = stats.t.ppf(1 - LEVEL / 2, seeds - 1)
    shift = abs(difference) / deviation * seeds**0.5
    found = stats.nct.sf(critical, seeds - 1, shift)
    wrong_way = stats.nct.cdf(-critical, seeds - 1, shift)  # scipy underflows to NaN
    return float(found + np.nan_to_num(wrong_way))


def detectable(deviation: float, seeds: int) -> float | None:
    """The smallest difference found with a probability of 80 %; None of a single seed."""
    if seeds < 2:
        return None
    if deviation == 0:
        return 0.0
    return deviation * detectable_in_deviations(seeds)


@cache
def detectable_in_deviations(seeds: int) -> float:
    """The detectable difference over the standard deviation."""
    enough = 1.0
    while power(enough, 1.0, seeds) < POWER:
        enough *= 2
    return float(optimize.brentq(lambda size: power(size, 1.0, seeds) - POWER, 1e-3, enough))


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p-values of a family; what has none stays without and counts as no member."""
    known = sorted((value, place) for place, value in enumerate(values) if value is not None)
    adjusted: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, (value, place) in enumerate(known):
        largest = max(largest, min(1.0, value * (len(known) - rank)))
        adjusted[place] = largest
    return adjusted


def over_items(differences: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Two models' scores, item by item: what *other items* would say of *these two* models.

    Mean, its standard error and the 95 % t-interval. It says nothing of other seeds.
    """
    found = over_seeds(differences)
    mean, low, high = (
        found.mean if value is None else value for value in (found.mean, found.low, found.high)
    )
    error = (found.deviation or 0.0) / found.seeds**0.5
    return {"mean": mean, "error": error, "low": low, "high": high, "count": found.seeds}


def over_seeds_and_items(differences: np.ndarray) -> dict[str, float]:
    """What other seeds *and* other items would say, by resampling both.

    Args:
        differences: [seeds, items], paired over both; at least two seeds.

    A resampled mean varies too little where there are few seeds (by (n-1)/n in variance), so the
    seeds' part is widened by that, and the interval takes Student's t of n-1 degrees.
    """
    seeds, items = differences.shape
    if seeds < 2:
        raise ValueError("items and seeds together need at least two seeds")
    generator = np.random.default_rng(0)
    by_seed = differences.mean(1, keepdims=True)
    wider = differences + (by_seed - by_seed.mean()) * ((seeds / (seeds - 1)) ** 0.5 - 1)
    # How often each seed and each item is drawn, [resamples, seeds] and [resamples, items].
    drawn_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES)
    drawn_items = generator.multinomial(items, np.full(items, 1 / items), RESAMPLES)
    means = ((drawn_seeds @ wider) * drawn_items).sum(1) / (seeds * items)
    mean, error = float(differences.mean()), float(np.std(means))
    reach = float(stats.t.ppf(1 - LEVEL / 2, seeds - 1)) * error
    return {
        "mean": mean,
        "error": error,
        "low": mean - reach,
        "high": mean + reach,
        "seeds": seeds,
        "items": items,
    }


def verdict(difference: Difference, adjusted: float | None, margin: float) -> str:
    """What may be said of one comparison: whether it differs, and whether that matters."""
    if adjusted is None:
        return "one seed: nothing can be said of other seeds"
    within = (equivalence(difference, margin) or 0.0) < LEVEL
    if adjusted < LEVEL:
        way = "lower" if difference.mean < 0 else "higher"
        return f"{way}, by less than what matters" if within else way
    return "no difference that matters" if within else "undecided"
