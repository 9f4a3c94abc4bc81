"""A run as its folder tells of it: metrics step by step, and scores."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.loading import as_read_today
from data.files import read_json
from l2e.problems import first_line
from launch.comparison.likeness import flat, flat_configuration

# Steps at the end whose mean stands for a run's loss.
LAST_STEPS = 100


@dataclass(frozen=True)
class RecordedRun:
    """A run's folder, its metrics by step, its scores by (task, shots), and its configuration,
    flat: {"train.seed": 1, ...}, None where the folder has none that can be read."""

    folder: Path
    steps: dict[int, dict[str, Any]]
    scores: dict[str, dict[str, Any]]
    configuration: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        return self.folder.name

    def series(self, key: str) -> dict[int, float]:
        """{step: value} of a metric, where it was written and is a finite number."""
        return {
            step: row[key]
            for step, row in self.steps.items()
            if isinstance(row.get(key), int | float) and math.isfinite(row[key])
        }

    def ended(self, key: str) -> dict[int, float]:
        """`series`, but nothing where the last value written is no finite number: of a run that
        diverged, what it came to before is not its end."""
        values = self.series(key)
        written = [step for step, row in self.steps.items() if key in row]
        return values if values and written[-1] in values else {}

    def layers(self, key: str) -> dict[str, dict[int, float]]:
        """{layer: {step: value}} of an inhibited layer's metric."""
        found: dict[str, dict[int, float]] = {}
        for step, row in self.steps.items():
            for layer, metrics in (row.get("l2e") or {}).items():
                if isinstance(metrics.get(key), int | float):
                    found.setdefault(layer, {})[step] = metrics[key]
        return found


def read_run(folder: Path) -> RecordedRun:
    """Read a run's folder; what a crash left of a line is told and left out.

    Raises:
        ValueError: no metrics there, or a line that is no step's record.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder}: no run (metrics.jsonl is missing); name the folder of a run")
    steps: dict[int, dict[str, Any]] = {}
    text = path.read_text("utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        record = record_of(line)
        if record is not None:
            steps[record["step"]] = record  # of a step trained twice, the later one
        elif line.endswith("\n") and "\0" not in line:
            raise ValueError(f"{path}, line {number}: no step's record; mend it or take it out")
        else:
            print(f"{path}, line {number}: cut off or damaged by a crash, and left out")
    if not steps:
        raise ValueError(f"{path}: holds no steps yet")
    return RecordedRun(
        folder,
        dict(sorted(steps.items())),
        read_scores(folder / "results"),
        read_configuration(folder / "config.json"),
    )


def read_configuration(path: Path) -> dict[str, Any] | None:
    """The run's configuration as it would be read today, each key by its dotted name."""
    written = read_json(path)
    if written is None:
        return None
    try:
        return flat_configuration(as_read_today(written))
    except ValueError as error:
        print(f"{path} is compared as it stands ({first_line(error)})")
    return dict(flat(written))


def record_of(line: str) -> dict[str, Any] | None:
    """What a line of metrics.jsonl says of its step; None for what a crash cut or damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def read_scores(folder: Path) -> dict[str, dict[str, Any]]:
    """{"sciq 0-shot": {"score", "error", "items", "hash", "step"}}, newest step of each."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        report = read_json(path)
        if report is None or not {"results", "shots", "items"} <= report.keys():
            continue  # damaged, which is told, or another tool's results
        for task, items in report["items"].items():
            name = f"{task} {report['shots'].get(task, 0)}-shot"
            step = report.get("step") or 0
            if "acc" not in items or found.get(name, {"step": -1})["step"] > step:
                continue
            metrics = report["results"][task]
            found[name] = {
                "score": metrics["acc"],
                "error": metrics.get("acc_stderr"),
                "items": items["acc"],
                "hash": items["hash"],
                "step": step,
            }
    return found


def last_mean(values: dict[int, float]) -> float | None:
    """Mean over the last `LAST_STEPS` steps."""
    return float(np.mean(list(values.values())[-LAST_STEPS:])) if values else None


def last_value(values: dict[int, float]) -> float | None:
    return values[max(values)] if values else None
