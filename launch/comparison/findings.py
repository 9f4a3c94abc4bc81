"""What an experiment found: each arm's readouts run by run, and paired differences over seeds."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from data.files import read_json
from launch.comparison import record, statistics
from launch.comparison.comparison import scores_over_seeds
from launch.comparison.likeness import unlike
from launch.comparison.plan import Arm, Plan, folder_of, validated
from launch.comparison.readouts import EQUAL_TIME, Readouts, curves, pace, readouts
from launch.comparison.runs import RecordedRun, read_run
from launch.comparison.statistics import Difference

Runs = dict[str, dict[int, RecordedRun]]  # by arm and seed


def find(folder: Path) -> dict[str, Any]:
    """Everything the page says, from an experiment's folder, of whatever runs are finished."""
    plans = record.read(folder)
    plan = validated(plans[-1]["plan"], folder / record.NAME)
    damaged: dict[str, str] = {}
    runs = {arm.name: finished_runs(plan, arm, folder, damaged) for arm in plan.arms}
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
        "damaged": damaged,
        "unlike": unlike(
            {
                arm: known
                for arm, seeds in runs.items()
                for known in [one.configuration for one in seeds.values()][:1]
                if known is not None and "evaluate.batches" in known  # else damaged, which is told
            }
        ),
        "arms": values,
        "without": without(plan, values),
        "differences": {
            against: differences(plan, runs, values, against) for against in references(plan)
        },
        "over_steps": {against: over_steps(runs, against) for against in references(plan)},
        "scores": {against: score_differences(runs, against) for against in references(plan)},
        "curves": {
            arm: {seed: curves(run) for seed, run in seeds.items()} for arm, seeds in runs.items()
        },
    }


def finished_runs(
    plan: Plan, arm: Arm, folder: Path, damaged: dict[str, str]
) -> dict[int, RecordedRun]:
    """An arm's finished runs by seed; those that cannot be read whole are put into `damaged`."""
    runs = {}
    for seed in plan.seeds[: arm.seeds]:
        path = folder_of(folder, arm.name, seed)
        if not (path / "finished").exists():
            continue
        try:
            run = read_run(path)
            last, steps = max(run.steps), (run.configuration or {}).get("train.steps")
            if steps is not None and last < steps:
                raise ValueError(
                    f"{path / 'metrics.jsonl'}: ends at step {last:,} of {steps:,}, though the run "
                    "is finished; put the whole file back, or delete the run's folder"
                )
        except ValueError as error:
            damaged[f"{arm.name}, seed {seed}"] = str(error)
        else:
            runs[seed] = run
    return runs


def references(plan: Plan) -> list[str]:
    """The arms that all others are held against: the plan's choice, and silenced layers."""
    silent = [arm.name for arm in plan.arms if arm.overrides.get("l2e.method") == "silence"]
    return list(dict.fromkeys([plan.primary.against, *silent]))


def without(plan: Plan, values: dict[str, dict[int, Readouts]]) -> dict[str, list[str]]:
    """Readouts that the plan asks for, and the arms whose finished runs lack them."""
    lacking = {
        readout: [
            arm
            for arm, seeds in values.items()
            if any(not needs(readout) <= found.keys() for found in seeds.values())
        ]
        for readout in (plan.primary.readout, *plan.readouts)
    }
    return {readout: arms for readout, arms in lacking.items() if arms}


def needs(readout: str) -> set[str]:
    """What runs must tell for a readout that is read off a pair of them, or off one."""
    return {"validation_loss", "step_seconds"} if readout == EQUAL_TIME else {readout}


def over_steps(runs: Runs, against: str) -> dict[str, dict[int, dict[str, Any]]]:
    """{arm: {step: its validation loss minus `against`'s}}, where all the arm's pairs have it.

    For looking at: a step that is chosen by its difference is no finding.
    """
    losses = {
        arm: {seed: run.series("validation_loss") for seed, run in seeds.items()}
        for arm, seeds in runs.items()
    }
    found = {}
    for arm, seeds in losses.items():
        pairs = [
            (losses[against][seed], own) for seed, own in seeds.items() if seed in losses[against]
        ]
        if arm == against or not pairs:
            continue
        steps = sorted(set.intersection(*(set(one) for pair in pairs for one in pair)))
        found[arm] = {
            step: asdict(statistics.over_seeds([own[step] - other[step] for other, own in pairs]))
            for step in steps
        }
    return found


def score_differences(runs: Runs, against: str) -> dict[str, dict[str, dict[str, float]]]:
    """{arm: {task: its difference from `against`'s}}, over seeds and items together."""
    base = runs[against]
    pairs = {
        arm: [(base[seed], run) for seed, run in seeds.items() if seed in base]
        for arm, seeds in runs.items()
        if arm != against
    }
    found = {arm: scores_over_seeds(both) for arm, both in pairs.items() if len(both) > 1}
    return {arm: told for arm, told in found.items() if told}


def differences(
    plan: Plan, runs: Runs, values: dict[str, dict[int, Readouts]], against: str
) -> dict[str, dict[str, dict[str, Any]]]:
    """{readout: {arm: its paired difference from `against`}}; each readout's arms are a family."""
    base = values[against]
    names = {name: None for seeds in values.values() for found in seeds.values() for name in found}
    table = {}
    for readout in (*names, EQUAL_TIME):
        family = {}
        for arm, seeds in values.items():
            both = [] if arm == against else paired_seeds(seeds, base, needs(readout))
            if both and readout == EQUAL_TIME:
                gaps = [at_equal_time(runs[arm][seed], runs[against][seed]) for seed in both]
            else:
                gaps = [seeds[seed][readout] - base[seed][readout] for seed in both]
            if gaps:
                family[arm] = statistics.over_seeds(gaps)
        adjusted = statistics.holm([difference.p for difference in family.values()])
        table[readout] = {
            arm: describe(plan, readout, difference, corrected)
            for (arm, difference), corrected in zip(family.items(), adjusted, strict=True)
        }
    return table


def paired_seeds(
    one: dict[int, Readouts], other: dict[int, Readouts], readouts: set[str]
) -> list[int]:
    """Seeds that both arms have the readouts of."""
    return [s for s in one if s in other and readouts <= one[s].keys() & other[s].keys()]


def at_equal_time(one: RecordedRun, other: RecordedRun) -> float:
    """`one`'s validation loss minus `other`'s when the faster of the two ends, at each one's pace.

    Both paces are measured, and vary from pair to pair: their noise is in the interval.
    """
    end = min(pace(run) * max(run.steps) for run in (one, other))
    losses = []
    for run in (one, other):
        known = run.series("validation_loss")
        # Between two evaluations, on the line from the one to the other.
        losses.append(float(np.interp(end / pace(run), list(known), list(known.values()))))
    return losses[0] - losses[1]


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
    read = [read_json(run.folder / "manifest.json") for run in runs]
    manifests = [manifest for manifest in read if manifest is not None]
    told: dict[str, set[str]] = {"commit": set(), "versions": set(), "hardware": set()}
    for manifest in manifests:
        told["commit"].add(manifest.get("git_commit") or "unknown (no git where it ran)")
        versions = manifest.get("versions", {})
        told["versions"].add(", ".join(f"{name} {version}" for name, version in versions.items()))
        told["hardware"].add(manifest.get("hardware", "unknown"))
    dates = sorted(manifest.get("created", "unknown") for manifest in manifests)
    first_and_last = list(dict.fromkeys(dates[:1] + dates[-1:]))
    return {name: sorted(values) for name, values in told.items()} | {"date": first_and_last}


def in_words(told: dict[str, Any]) -> str:
    return str(Difference(**{key: told[key] for key in Difference.__dataclass_fields__}))


def summary(found: dict[str, Any]) -> str:
    """The primary readout's differences in lines."""
    plan = Plan.model_validate(found["plans"][-1]["plan"])
    readout = plan.primary.readout
    lines = [found["question"]]
    for against, table in found["differences"].items():
        lines.append(f"{readout} minus {against}'s, paired over seeds, 95 % t-interval:")
        for arm, told in table.get(readout, {}).items():
            lines.append(f"  {arm:<20} {in_words(told)}: {told['verdict']}")
        if told := table.get(EQUAL_TIME, {}).get(plan.primary.arm):
            lines.append(f"  {plan.primary.arm} at equal time: {in_words(told)}")
    lines += [f"not alike: {told}" for told in found["unlike"]]
    lines += [f"left out: {name}: {reason}" for name, reason in found["damaged"].items()]
    lines += [
        f"not measured: {readout} (arms {', '.join(arms)})"
        for readout, arms in found["without"].items()
    ]
    lines += [
        f"missing: {arm}, seeds {', '.join(map(str, seeds))}"
        for arm, seeds in found["missing"].items()
    ]
    return "\n".join(lines)
