"""Losses that jump: seen against a running estimate that they themselves hardly move.

The estimate is the median of the last losses, and their spread the median distance from it
(times 1.4826, a normal distribution's standard deviation): half of them would have to jump before
it follows. A new level, after a change that lasts, is so taken for what it is within a window.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import Any

from configs import Config
from launch.training.bad_steps import Rollback

WINDOW, ENOUGH = 128, 32  # losses that are remembered, and that the first judgement needs
NORMAL = 1.4826  # standard deviations of a normal distribution in its median distance
SMALLEST = 0.005  # share of the median that the spread is at least: a tiny run may have none


class Spikes:
    """What `train.on_spike` says of a run's steps. Every rank sees the same numbers."""

    def __init__(
        self, config: Config, describe: Callable[[int], str], say: Callable[[str], None]
    ) -> None:
        """describe: a step's batch in words."""
        self.threshold, self.policy = config.train.spike_threshold, config.train.on_spike
        self.describe, self.say = describe, say
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.untold: dict[int, str] = {}
        self.seen = 0

    def count(self, records: list[dict[str, Any]]) -> None:
        """Note in each record how many spikes this job has seen up to it."""
        for record in records:
            loss = record["lm_loss"]
            if math.isfinite(loss):
                if (height := self.height(loss)) > self.threshold:
                    self.seen += 1
                    self.untold[record["step"]] = self.in_words(record["step"], loss, height)
                self.losses.append(loss)
            record["loss_spikes"] = self.seen

    def height(self, loss: float) -> float:
        """By how many standard deviations a loss lies above the estimate; 0 while there is none."""
        if len(self.losses) < ENOUGH or not self.threshold:
            return 0.0
        middle = median(self.losses)
        spread = NORMAL * median(abs(one - middle) for one in self.losses)
        return (loss - middle) / max(spread, SMALLEST * abs(middle))

    def in_words(self, step: int, loss: float, height: float) -> str:
        return (
            f"the loss jumped at step {step}: {loss:.4f}, {height:.1f} standard deviations above "
            f"{median(self.losses):.4f}, the median of the {len(self.losses)} before"
        )

    def judge(self) -> None:
        """Say what was seen, after the records are written.

        Raises:
            Rollback: on every rank, if the run is to go back and past the batch.
        """
        untold, self.untold = self.untold, {}
        for step, words in untold.items():
            found = f"{words}; its batch: {self.describe(step)}"
            if self.policy == "rollback":
                raise Rollback(found, step)
            self.say(found)
