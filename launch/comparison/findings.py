"""What an experiment found: each arm's figures run by run, and paired differences over seeds."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from launch.comparison import record, statistics
from launch.comparison.comparison import RecordedRun, last_mean, last_value, read_run
from launch.comparison.plan import Plan, folder_of
from launch.comparison.statistics import Difference

LAYER_FIGURES = ("std", "kurtosis", "mean_ms", "mlp_to_residual", "selected_fraction")
# Measured steps at the end whose mean stands for a layer's figure: one step's is noisy.
LAST_MEASURED = 10
Readouts = dict[str, float]


def find(folder: Path) -> dict[str, Any]:
    """Everything the page says, from an experiment's folder, of whatever runs are finished."""
    plans = record.read(folder)
    plan = Plan.model_validate(plans[-1]["plan"])
    runs = {
        arm.name: {
            seed: read_run(path)
            for seed in plan.seeds[: arm.seeds]
            if ((path := folder_of(folder, arm.name, seed)) / "finished").exists()
        }
        for arm in plan.arms
    }
    values = {
        arm: {seed: readouts(run) for seed, run in seeds.items()} for arm, seeds in runs.items()
    }
    return {
        "question": plan.question,
        "plans": plans,
        "provenance": provenance([run for seeds in runs.values() for run in seeds.values()]),
        "missing": {
            arm.name: missing
            for arm in plan.arms
            if (missing := [s for s in plan.seeds[: arm.seeds] if s not in runs[arm.name]])
        },
        "arms": values,
        "differences": {
            against: differences(plan, values, against) for against in references(plan)
        },
        "curves": {
            arm: {seed: curves(run) for seed, run in seeds.items()} for arm, seeds in runs.items()
        },
    }


def references(plan: Plan) -> list[str]:
    """The arms that all others are held against: the plan's choice, and silenced layers."""
    silent = [arm.name for arm in plan.arms if arm.overrides.get("l2e.method") == "silence"]
    return list(dict.fromkeys([plan.primary.against, *silent]))


def readouts(run: RecordedRun) -> Readouts:
    """A finished run's figures; of the inhibited layers their mean."""
    found = {
        "validation_loss": last_value(run.series("validation_loss")),
        "training_loss": last_mean(run.series("lm_loss")),
        "training_seconds": sum(run.series("step_seconds").values()),
    }
    manifest = json.loads((run.folder / "manifest.json").read_text(encoding="utf-8"))
    size = manifest["data"]["bytes_per_token"]
    if size and found["validation_loss"] is not None:
        found["bits_per_byte"] = found["validation_loss"] / math.log(2) / size
    for figure in LAYER_FIGURES:
        layers = run.layers(figure)
        ends = [np.mean(list(steps.values())[-LAST_MEASURED:]) for steps in layers.values()]
        found[figure] = float(np.mean(ends)) if ends else None
        for layer, end in zip(layers, ends, strict=True):
            found[f"{figure}, block {layer}"] = float(end)
    for name, rise in (last_row(run).get("layer_worth") or {}).items():
        title = "the inhibited layers' worth" if name == "together" else f"worth, block {name}"
        found[title] = rise
    found |= {name: score["score"] for name, score in run.scores.items()}
    return {name: value for name, value in found.items() if value is not None}


def last_row(run: RecordedRun) -> dict[str, Any]:
    return run.steps[max(run.steps)]


def curves(run: RecordedRun) -> dict[str, dict[int, float]]:
    """Figures over steps: {readout: {step: value}}, of layers their mean."""
    found = {"validation_loss": run.series("validation_loss")}
    for figure in LAYER_FIGURES:
        layers = [*run.layers(figure).values()]
        shared = set.intersection(*(set(steps) for steps in layers)) if layers else set()
        found[figure] = {
            step: float(np.mean([steps[step] for steps in layers])) for step in sorted(shared)
        }
    return found


def differences(
    plan: Plan, values: dict[str, dict[int, Readouts]], against: str
) -> dict[str, dict[str, dict[str, Any]]]:
    """{readout: {arm: its paired difference from `against`}}; each readout's arms are a family."""
    base = values[against]
    names = {name: None for seeds in values.values() for found in seeds.values() for name in found}
    table = {}
    for readout in names:
        family = {
            arm: statistics.over_seeds(
                [seeds[seed][readout] - base[seed][readout] for seed in both]
            )
            for arm, seeds in values.items()
            if arm != against and (both := paired_seeds(seeds, base, readout))
        }
        adjusted = statistics.holm([difference.p for difference in family.values()])
        table[readout] = {
            arm: describe(plan, readout, difference, corrected)
            for (arm, difference), corrected in zip(family.items(), adjusted, strict=True)
        }
    return table


def paired_seeds(one: dict[int, Readouts], other: dict[int, Readouts], readout: str) -> list[int]:
    """Seeds that both arms have the readout of."""
    return [s for s in one if s in other and readout in one[s] and readout in other[s]]


def describe(
    plan: Plan, readout: str, difference: Difference, adjusted: float | None
) -> dict[str, Any]:
    """A difference with what may be said of it; what matters is known of one readout only."""
    found = asdict(difference) | {"seeds": difference.seeds, "p_holm": adjusted}
    if readout == plan.primary.readout:
        margin = plan.smallest_difference
        found["p_equivalence"] = statistics.equivalence(difference, margin)
        found["verdict"] = statistics.verdict(difference, adjusted, margin)
    return found


def provenance(runs: list[RecordedRun]) -> dict[str, list[str]]:
    """Commits, versions, machines and dates of the runs, each different one once."""
    manifests = [json.loads((run.folder / "manifest.json").read_text()) for run in runs]
    told: dict[str, set[str]] = {"commit": set(), "versions": set(), "hardware": set()}
    for manifest in manifests:
        told["commit"].add(manifest["git_commit"] or "unknown (no git where it ran)")
        told["versions"].add(", ".join(f"{k} {v}" for k, v in manifest["versions"].items()))
        told["hardware"].add(manifest["hardware"])
    dates = sorted(manifest["created"] for manifest in manifests)
    first_and_last = list(dict.fromkeys(dates[:1] + dates[-1:]))
    return {name: sorted(values) for name, values in told.items()} | {"date": first_and_last}


def summary(found: dict[str, Any]) -> str:
    """The primary readout's differences in lines."""
    plan = Plan.model_validate(found["plans"][-1]["plan"])
    readout = plan.primary.readout
    lines = [found["question"]]
    for against, table in found["differences"].items():
        lines.append(f"{readout} minus {against}'s, paired over seeds, 95 % t-interval:")
        for arm, told in table.get(readout, {}).items():
            fields = {key: told[key] for key in Difference.__dataclass_fields__}
            lines.append(f"  {arm:<20} {Difference(**fields)}: {told['verdict']}")
    lines += [
        f"missing: {arm}, seeds {', '.join(map(str, seeds))}"
        for arm, seeds in found["missing"].items()
    ]
    return "\n".join(lines)
