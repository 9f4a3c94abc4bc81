"""Run lm-evaluation-harness on a model and read its answer: scores, table, official numbers."""

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import lm_eval

from launch.evaluation.harness import HarnessModel
from launch.evaluation.local_tasks import LocalTask
from launch.evaluation.tasks import Selection, harness_apart

REFERENCE = Path(__file__).with_name("pythia_reference.json")
# Resamples for the standard errors that have no formula (perplexity).
BOOTSTRAP = 1000
# The harness's own default, so that few-shot examples are those of its command line.
FEWSHOT_SEED = 1234
# A score this many standard errors from chance is told apart from it (5 %, two-sided).
SIGNIFICANT = 1.96


def evaluate(
    model: HarnessModel, selection: Selection, shots: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """Scores of `model` on the selected tasks, `shots` examples before each item.

    Returns {"results": {task: {metric: value, metric_stderr: value}}, "versions", "shots",
    "chance": {task: accuracy of guessing}, "items": per-item scores, "groups", "skipped", "cut":
    {task: items whose prompt was too long for the model and lost its beginning}, "shortened":
    {task: items whose answer had less room than the task gives it}}.
    Python's, NumPy's and torch's random states stay as they were.
    """
    for task in selection.tasks["tasks"].values():
        # Tasks that fix 0 examples in their own definition keep it, as in the harness.
        if task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=shots)
        task.set_fewshot_seed(FEWSHOT_SEED)
        if isinstance(task, LocalTask) and (examples := task.get_config("num_fewshot")):
            task.check_examples(examples)
    with harness_apart():
        raw = lm_eval.evaluate(model, selection.tasks, limit=limit, bootstrap_iters=BOOTSTRAP)
    return report(raw, selection, limit) | {
        key: {task: len(items) for task, items in getattr(model, key, {}).items()}
        for key in ("cut", "shortened")  # which the harness's own models do not count
    }


def report(raw: dict[str, Any], selection: Selection, limit: int | None) -> dict[str, Any]:
    """The harness's answer in our form."""
    items = {task: item_scores(samples) for task, samples in raw["samples"].items()}
    guess = {task: guessing(samples) for task, samples in raw["samples"].items()}
    chance = {task: value for task, value in guess.items() if value is not None}
    for group, members in reversed(raw["group_subtasks"].items()):
        known = [chance[member] for member in members if member in chance]
        if known:
            chance[group] = sum(known) / len(known)
    libraries = ("lm_eval", "torch", "transformers")
    return {
        "results": {task: scores(metrics) for task, metrics in raw["results"].items()},
        "versions": {name: importlib.metadata.version(name) for name in libraries}
        | {task: version for task, version in raw["versions"].items() if version is not None},
        "shots": raw["n-shot"],
        "limit": limit,
        "chance": chance,
        "groups": raw["group_subtasks"],
        "skipped": selection.skipped,
        "items": items,
    }


def scores(metrics: dict[str, Any]) -> dict[str, float]:
    """{"acc,none": .5, "acc_stderr,none": .1} without the filter's name; numbers only."""
    return {
        key.split(",")[0]: value
        for key, value in metrics.items()
        if "," in key and isinstance(value, int | float)
    }


def item_scores(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Each item's value of each metric in item order, and a hash that says which items they are."""
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    digest = hashlib.sha256("".join(sample["doc_hash"] for sample in ordered).encode())
    metrics = ordered[0]["metrics"]
    values = {
        metric: [sample[metric] for sample in ordered]
        for metric in metrics
        if all(isinstance(sample[metric], int | float) for sample in ordered)
    }
    return {"hash": digest.hexdigest(), "count": len(ordered), **values}


def guessing(samples: list[dict[str, Any]]) -> float | None:
    """Accuracy of picking a choice blindly; None where an item has no choices."""
    choices = [len(sample["arguments"]) for sample in samples]
    return sum(1 / count for count in choices) / len(choices) if min(choices) > 1 else None


def official(model: str, shots: int, step: int | None) -> tuple[int, dict[str, dict[str, float]]]:
    """EleutherAI's published scores of `model` at the step nearest to `step` (last if None).

    Raises:
        ValueError: no numbers for this model or number of shots.
    """
    models = json.loads(REFERENCE.read_text())["models"]
    if model not in models:
        raise ValueError(f"--reference {model}: official numbers here are of {', '.join(models)}")
    by_shots = models[model]
    if str(shots) not in by_shots:
        raise ValueError(
            f"--reference {model}: published with {' and '.join(by_shots)} shots, not {shots}; "
            "change --shots or leave --reference out"
        )
    steps = {int(number): scores for number, scores in by_shots[str(shots)].items()}
    nearest = max(steps) if step is None else min(steps, key=lambda number: abs(number - step))
    return nearest, steps[nearest]


def table(
    report: dict[str, Any], reference: tuple[str, dict[str, dict[str, float]]] | None = None
) -> str:
    """The scores in per cent, one line a task; `reference` is (title, official scores)."""
    title, published = reference or ("", {})
    rows = [["task", "metric", "score", *([title] if reference else []), "chance", ""]]
    members = {member for group in report["groups"].values() for member in group}
    for task, metrics in report["results"].items():
        if task in members:
            continue
        chance = report["chance"].get(task)
        for metric, value in metrics.items():
            if metric.endswith("_stderr"):
                continue
            theirs = published.get(task, {})
            rows.append(
                [
                    task,
                    metric,
                    with_error(metric, value, metrics.get(f"{metric}_stderr")),
                    *(
                        [with_error(metric, theirs.get(metric), theirs.get(f"{metric}_stderr"))]
                        if reference
                        else []
                    ),
                    f"{100 * chance:.1f}" if chance and metric == "acc" else "",
                    verdict(metric, metrics, chance),
                ]
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines += [f"left out: {reason}" for reason in report["skipped"].values()]
    for key, what in (("cut", "the prompt lost its beginning"), ("shortened", "answers cut short")):
        lines += [
            f"too long for the model, {what}: {task}, {count} of {report['items'][task]['count']}"
            for task, count in report.get(key, {}).items()
        ]
    return "\n".join(lines)


def with_error(metric: str, value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    scale, digits = (1, 2) if metric.endswith("perplexity") else (100, 1)
    spread = f" ± {scale * error:.{digits}f}" if error is not None else ""
    return f"{scale * value:.{digits}f}{spread}"


def verdict(metric: str, metrics: dict[str, float], chance: float | None) -> str:
    """Whether the accuracy can be told from guessing."""
    error = metrics.get("acc_stderr")
    if metric != "acc" or chance is None or error is None:
        return ""
    distance = (metrics["acc"] - chance) / error if error else float("inf")
    if abs(distance) < SIGNIFICANT:
        return "at chance"
    return "below chance" if distance < 0 else ""
