"""The learning rate of each optimizer step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from configs import Config


def learning_rate(config: Config, step: int) -> float:
    """The rate of update `step` (counted from 0), as gpt-neox anneals it.

    Warm-up is linear from 0, so update 0 changes nothing and Pythia's checkpoint 1 equals its
    checkpoint 0. `neox_v1` is the formula Pythia was trained with: a cosine over decay_steps that
    starts where warm-up ends and is cut off at the floor. `neox` is today's: it reaches the floor
    exactly at decay_steps.
    """
    peak, schedule = config.optimizer.learning_rate, config.schedule
    floor, warmup = schedule.floor_ratio * peak, schedule.warmup_steps
    if step < warmup or (step == warmup and warmup > 0):
        return peak * step / warmup
    if schedule.type == "constant":
        return peak
    decay = schedule.decay_steps or config.train.steps
    if schedule.type == "neox_v1":
        return max(floor, peak / 2 * (math.cos(math.pi * (step - warmup) / decay) + 1))
    progress = min(1.0, (step - warmup) / max(1, decay - warmup))
    return floor + (peak - floor) / 2 * (math.cos(math.pi * progress) + 1)
