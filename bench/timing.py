"""Paired timing: contenders take turns, so that a machine's drift hits all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class MedianInterval:
    """A median with its 95 % bootstrap interval, in the unit of the values it came from."""

    median: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def estimate(values: Sequence[float], resamples: int = 2000, seed: int = 0) -> MedianInterval:
    """The median of `values` and the 2.5 % and 97.5 % quantiles of its bootstrap distribution."""
    sample = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(sample), size=(resamples, len(sample)))
    low, high = np.quantile(np.median(sample[drawn], axis=1), [0.025, 0.975])
    return MedianInterval(float(np.median(sample)), float(low), float(high))


def seconds(call: Callable[[], object]) -> float:
    """Seconds of one call.

    On a GPU, wall-clock time with its queue drained before and after. On a CPU with one thread,
    the time that thread ran: other programs on the machine then hardly count. Wall-clock time
    with several threads.
    """
    clock = time.perf_counter
    if not torch.cuda.is_available() and torch.get_num_threads() == 1:
        clock = time.process_time
    _drain()
    start = clock()
    call()
    _drain()
    return clock() - start


def interleave(
    contenders: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 3
) -> dict[str, list[float]]:
    """Seconds of each call, by contender: A B C, then C B A, and so on.

    Turning the order round every time cancels what a contender leaves to its successor
    (caches, clocks) to first order.
    """
    for call in contenders.values():
        for _ in range(warmup):
            call()
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            taken[name].append(seconds(contenders[name]))
    return taken


def added(taken: Mapping[str, Sequence[float]], name: str, baseline: str) -> MedianInterval:
    """The share of time `name` takes over `baseline`, in percent, from round-by-round ratios."""
    ratios = np.asarray(taken[name]) / np.asarray(taken[baseline])
    return estimate(100 * (ratios - 1))


def _drain() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
