"""Two or more runs side by side: how far they differ, and what of it can be concluded."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from launch.checkpoint import folders
from launch.comparison import statistics
from launch.comparison.readouts import LAYER_READOUTS
from launch.comparison.runs import LAST_STEPS, RecordedRun, last_mean, last_value

# What of a step must agree between equal runs, in the order of telling.
EQUAL_KEYS = ("lm_loss", "ms_loss", "grad_norm", "lr", "loss_scale")


def compare(runs: list[RecordedRun], arms: int | None = None) -> dict[str, Any]:
    """All metrics of all runs, and each run (or the second arm) against the first."""
    pairs = list(zip(runs[:arms], runs[arms:], strict=True)) if arms else []
    others = [(runs[0], other) for other in runs[1:]] if not arms else pairs
    return {
        "runs": {str(run.folder): summary(run) for run in runs},
        "configurations": configurations(runs),
        "without_configuration": [str(run.folder) for run in runs if not run.configuration],
        "differences": [difference(one, other) for one, other in others],
        "over_seeds": over_seeds(pairs) if len(pairs) > 1 else None,
    }


def configurations(runs: list[RecordedRun]) -> dict[str, dict[str, Any]]:
    """{key: {run: its value}} of the keys in which the configurations that are known differ."""
    known = {str(run.folder): run.configuration for run in runs if run.configuration}
    keys = {key: None for one in known.values() for key in one}
    values = {key: {run: one.get(key) for run, one in known.items()} for key in keys}
    return {key: of for key, of in values.items() if len({json.dumps(v) for v in of.values()}) > 1}


def summary(run: RecordedRun) -> dict[str, Any]:
    losses, validation = run.ended("lm_loss"), run.ended("validation_loss")
    return {
        "last_step": max(run.steps),
        "lm_loss": last_mean(losses),
        "lm_loss_steps": min(LAST_STEPS, len(losses)),
        "validation_loss": last_value(validation),
        "validation_step": max(validation, default=None),
        "not_finite": [
            key
            for key in ("lm_loss", "validation_loss")
            if not run.ended(key) and any(key in row for row in run.steps.values())
        ],
        "l2e": {
            key: {layer: last_value(values) for layer, values in run.layers(key).items()}
            for key in LAYER_READOUTS
        },
        "scores": {
            name: {key: score[key] for key in ("score", "error", "step")}
            for name, score in run.scores.items()
        },
    }


def difference(one: RecordedRun, other: RecordedRun) -> dict[str, Any]:
    """`other` minus `one`. A single pair says nothing of other seeds: its losses get no interval.

    The scores' intervals speak of these two models, on other items of the same kind.
    """
    found: dict[str, Any] = {"from": str(one.folder), "to": str(other.folder)}
    for key in ("lm_loss", "validation_loss"):
        pairs = paired(one.ended(key), other.ended(key))
        pairs = pairs[-LAST_STEPS:] if key == "lm_loss" else pairs[-1:]
        mean = float((pairs[:, 1] - pairs[:, 0]).mean()) if len(pairs) else None
        found[key] = None if mean is None else {"mean": mean, "steps": len(pairs)}
    found["scores"] = {
        name: statistics.over_items(items)
        for name in one.scores
        if (items := paired_items(one, other, name)) is not None
    }
    return found


def paired(one: dict[int, float], other: dict[int, float]) -> np.ndarray:
    """[steps, 2]: the values of the steps that both have."""
    return np.array([(one[step], other[step]) for step in one if step in other]).reshape(-1, 2)


def paired_items(one: RecordedRun, other: RecordedRun, name: str) -> np.ndarray | None:
    """[items]: a task's differences where both runs were asked the same items."""
    if name not in other.scores or other.scores[name]["hash"] != one.scores[name]["hash"]:
        return None
    return np.subtract(other.scores[name]["items"], one.scores[name]["items"])


def over_seeds(pairs: list[tuple[RecordedRun, RecordedRun]]) -> dict[str, Any]:
    """The second arm minus the first over pairs of runs: what other seeds would say.

    Losses by the paired t-interval; scores by resampling seeds and items together.
    """
    found: dict[str, Any] = {}
    for key in ("lm_loss", "validation_loss"):
        ends = [difference(one, other)[key] for one, other in pairs]
        if all(end is not None for end in ends):
            found[key] = asdict(statistics.over_seeds([end["mean"] for end in ends]))
    return found | scores_over_seeds(pairs)


def scores_over_seeds(pairs: list[tuple[RecordedRun, RecordedRun]]) -> dict[str, dict[str, float]]:
    """The tasks that all runs were asked, with the same items: {task: what other seeds and other
    items would say}; at least two pairs."""
    found = {}
    for name in sorted(set.intersection(*({*run.scores} for pair in pairs for run in pair))):
        tables = [paired_items(one, other, name) for one, other in pairs]
        known = [table for table in tables if table is not None]
        if len(known) == len(pairs) and len({len(table) for table in known}) == 1:
            found[name] = statistics.over_seeds_and_items(np.stack(known))
    return found


def table(report: dict[str, Any]) -> str:
    """The report in lines."""
    lines = []
    for folder, values in report["runs"].items():
        shown = [f"{values['last_step']} steps"]
        if values["validation_loss"] is not None:
            last = values["validation_step"]
            after = "" if last == values["last_step"] else f" (after step {last})"
            shown.append(f"last validation loss {values['validation_loss']:.4f}{after}")
        if values["lm_loss"] is not None:
            last = values["lm_loss_steps"]
            shown.append(f"loss {values['lm_loss']:.4f} (mean of the last {last} steps)")
        shown += [f"diverged: its last {key} is not finite" for key in values["not_finite"]]
        lines.append(f"{folder}: {', '.join(shown)}")
        for key, layers in values["l2e"].items():
            if layers:
                each = ", ".join(f"{layer}: {value:.4g}" for layer, value in layers.items())
                lines.append(f"  {key:<18} {each}")
        for name, score in values["scores"].items():
            error = f" ± {100 * score['error']:.1f}" if score["error"] is not None else ""
            lines.append(f"  {name:<18} {100 * score['score']:.1f}{error} %")
    for folder in report["without_configuration"]:
        lines.append(f"{folder}: its configuration is unknown (config.json)")
    if report["configurations"]:
        lines.append("the configurations differ in")
    for key, of in report["configurations"].items():
        each = ", ".join(f"{folder}: {json.dumps(value)}" for folder, value in of.items())
        lines.append(f"  {key:<18} {each}")
    for change in report["differences"]:
        lines.append(f"{change['to']} minus {change['from']}")
        for key in ("lm_loss", "validation_loss"):
            if change[key]:
                lines.append(
                    f"  {key:<18} {change[key]['mean']:+.4f} (one seed, no interval; "
                    f"{shared(change[key]['steps'])})"
                )
        lines += [
            f"  {name:<18} {statistics.interval(value, scale=100)} points; of these two models, on "
            f"other items than these {value['count']}"
            for name, value in change["scores"].items()
        ]
    if report["over_seeds"]:
        lines.append("second arm minus first, 95 % interval over seeds")
        lines += [
            f"  {name:<18} {statistics.interval(value)}"
            for name, value in report["over_seeds"].items()
        ]
    return "\n".join(lines)


def shared(steps: int) -> str:
    return f"mean over the last {steps} shared steps" if steps > 1 else "at the last shared step"


# --- equality ----------------------------------------------------------------------------------


def first_difference(one: RecordedRun, other: RecordedRun, tolerance: float) -> str | None:
    """Where two runs that should be equal part, in words; None if they don't.

    Steps are compared one by one, then the tensors of the newest checkpoint that both have.
    """
    shared = sorted(one.steps.keys() & other.steps.keys())
    if not shared:
        return "they share no step"
    for step in shared:
        for key in EQUAL_KEYS:
            left, right = one.steps[step].get(key), other.steps[step].get(key)
            if left is None and right is None:
                continue
            gap = relative_gap(left, right)
            if not gap <= tolerance:
                return f"{key} differs first at step {step}: {left} and {right} ({gap:.1e})"
    for name, gap in tensor_gaps(one.folder, other.folder):
        if not gap <= tolerance:
            return f"losses agree, but {name} differs by {gap:.1e} of its largest entry"
    return None


def relative_gap(left: float | None, right: float | None) -> float:
    if left is None or right is None:
        return float("inf")
    return abs(left - right) / max(abs(left), abs(right), 1e-30) if left != right else 0.0


def tensor_gaps(one: Path, other: Path) -> Iterator[tuple[str, float]]:
    """(checkpoint and tensor, largest difference over largest entry) of the newest shared step."""
    from launch.checkpoint.stored import StoredCheckpoint  # brings the whole model with it

    steps = [
        {folders.step_of(path): path for path in folders.current(run / "checkpoints")}
        for run in (one, other)
    ]
    if not (shared := steps[0].keys() & steps[1].keys()):
        return
    left, right = (StoredCheckpoint(found[max(shared)]) for found in steps)
    for kind, tensors in left.tensors.items():
        theirs = right.tensors.get(kind, {})
        for name in sorted(tensors.keys() | theirs.keys()):
            title = f"{left.folder.name} {kind} {name}"
            if name not in tensors or name not in theirs:
                yield title, float("inf")
                continue
            ours, others = left.read(name, kind), right.read(name, kind)
            if ours.shape != others.shape:
                yield title, float("inf")
            else:
                largest = max(float(ours.abs().max()), 1e-30)
                yield title, float((ours - others).abs().max()) / largest
