"""What is read off a finished run: one number each, and curves over steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from data.files import read_json
from launch.comparison.runs import RecordedRun, last_mean

if TYPE_CHECKING:
    from configs import Config

# Of each inhibited layer, logged in training.
LAYER_READOUTS = (
    "std",
    "kurtosis",
    "mean_ms",
    "mlp_to_residual",
    "selected_fraction",
    "gradient_ratio",
)
# Of each layer, on the passages of a feature set.
FEATURE_READOUTS = ("fkr", "ks")
EQUAL_TIME = "validation_loss_at_equal_time"
WORTH = "the inhibited layers' worth"
NAMES = (
    *("validation_loss", "bits_per_byte", EQUAL_TIME, "training_loss"),
    *("step_seconds", "training_seconds"),
    *(*LAYER_READOUTS, *FEATURE_READOUTS, WORTH),
)
# Measured steps at the end whose mean stands for a layer's readout: one step's is noisy.
LAST_MEASURED = 10
Readouts = dict[str, float]


def problem_with(readout: str, config: Config) -> str | None:
    """Why a run of this configuration would not tell a readout; None if it would."""
    name, _, block = readout.partition(", block ")
    if readout.endswith("-shot"):
        return None if config.evaluate.tasks else "set evaluate.tasks"
    if name not in (*NAMES, "worth"):
        known = ", ".join(NAMES)
        return f"unknown; there are {known}, each layer's as 'std, block 2', and 'TASK 0-shot'"
    if block and not (block.isdecimal() and int(block) < config.model.num_layers):
        return f"there is no block {block}; they are 0 to {config.model.num_layers - 1}"
    if name in FEATURE_READOUTS and config.monitor.features is None:
        return "set monitor.features to a feature set (launch/prepare.py features)"
    if name in (WORTH, "worth") and not config.evaluate.layer_worth:
        return "set evaluate.layer_worth"
    return None


def readouts(run: RecordedRun) -> Readouts:
    """A finished run's readouts, those of a pair not among them; of the inhibited layers their
    mean."""
    found = {
        # At the last step alone: a run that diverged has none, and no earlier one stands for it.
        "validation_loss": run.series("validation_loss").get(max(run.steps)),
        "training_loss": last_mean(run.series("lm_loss")),
        "step_seconds": pace(run) if run.series("step_seconds") else None,
        "training_seconds": sum(run.series("step_seconds").values()),
    }
    manifest = read_json(run.folder / "manifest.json") or {}
    size = manifest.get("data", {}).get("bytes_per_token")
    if size and found["validation_loss"] is not None:
        found["bits_per_byte"] = found["validation_loss"] / math.log(2) / size
    for name in LAYER_READOUTS:
        layers = run.layers(name)
        ends = [np.mean(list(steps.values())[-LAST_MEASURED:]) for steps in layers.values()]
        found[name] = float(np.mean(ends)) if ends else None
        for layer, end in zip(layers, ends, strict=True):
            found[f"{name}, block {layer}"] = float(end)
    found |= dict(on_features(run))
    for name, rise in (last_row(run).get("layer_worth") or {}).items():
        found[WORTH if name == "together" else f"worth, block {name}"] = rise
    found |= {name: score["score"] for name, score in run.scores.items()}
    return {name: value for name, value in found.items() if value is not None}


def pace(run: RecordedRun) -> float:
    """Seconds a step: the median, which the first steps and stalls do not move, without validation
    and saving."""
    return float(np.median([*run.series("step_seconds").values()]))


def on_features(run: RecordedRun) -> Iterator[tuple[str, float]]:
    """What the monitor found after the last step: each layer's, and the inhibited ones' mean.

    A layer of dead neurons has none.
    """
    layers = last_row(run).get("monitor") or {}
    inhibited = run.layers("std").keys()
    for name in FEATURE_READOUTS:
        known = {layer: row[name] for layer, row in layers.items() if row[name] is not None}
        for layer, value in known.items():
            yield f"{name}, block {layer}", value
        if inhibited and inhibited <= known.keys():
            yield name, float(np.mean([known[layer] for layer in inhibited]))


def last_row(run: RecordedRun) -> dict[str, Any]:
    return run.steps[max(run.steps)]


def curves(run: RecordedRun) -> dict[str, dict[int, float]]:
    """Readouts over steps: {readout: {step: value}}, of layers their mean."""
    found = {"validation_loss": run.series("validation_loss")}
    for name in LAYER_READOUTS:
        layers = [*run.layers(name).values()]
        shared = set.intersection(*(set(steps) for steps in layers)) if layers else set()
        found[name] = {
            step: float(np.mean([steps[step] for steps in layers])) for step in sorted(shared)
        }
    return found
