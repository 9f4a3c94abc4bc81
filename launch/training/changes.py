"""What a resumed run does otherwise than the run its checkpoint is from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from configs import Config
from configs.loading import as_read_today
from launch.checkpoint.stored import StoredCheckpoint
from launch.training.schedule import learning_rate

# Of the rate; less is rounding, or the last digits of another form of the same schedule.
JUMP = 0.01


def told_changes(checkpoint: Path, config: Config, step: int) -> Iterator[str]:
    """Each key that differs from the checkpoint's configuration, and a jump of the rate."""
    before = StoredCheckpoint(checkpoint).config
    if "train" not in before:
        return  # weights alone, of no run
    now = json.loads(config.model_dump_json())
    try:
        known = as_read_today(before)
    except ValidationError:
        yield from told(before, now)
        yield "the checkpoint's learning rate is unknown here: its configuration is an older form"
        return
    yield from told(json.loads(known.model_dump_json()), now)
    old, new = learning_rate(known, step), learning_rate(config, step)
    if abs(new - old) > JUMP * max(new, old):
        yield (
            f"WARNING: the learning rate jumps from {old:.3g} to {new:.3g} at step {step + 1} "
            f"(optimizer.learning_rate, schedule.* or train.steps)"
        )


def told(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """The differences as lines of a run."""
    for difference in differences(before, now):
        yield f"other than the checkpoint's configuration: {difference}"


def differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Keys that two configurations, as dicts of sections, have different values for."""
    for path, old, new in unlike(before, now):
        yield f"{path} was {json.dumps(old)}, is {json.dumps(new)}"


def unlike(
    one: dict[str, Any], other: dict[str, Any], name: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value in one, value in the other) where two nested dicts differ."""
    for key in {**one, **other}:
        left, right, path = one.get(key), other.get(key), f"{name}.{key}".lstrip(".")
        if isinstance(left, dict) and isinstance(right, dict):
            yield from unlike(left, right, path)
        elif left != right:
            yield path, left, right
