"""What a run writes down: the lines that survive a resume, and numbers that JSON can hold."""

import json
from pathlib import Path

import torch

from launch.training.logs import MetricsFile, as_json


def test_a_resumed_run_keeps_the_lines_of_finished_steps_only(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    before = MetricsFile(path, 0)
    for step in (1, 2, 3, 4):
        before.write({"step": step, "run": "first"})
    after = MetricsFile(path, 2)
    after.write({"step": 3, "run": "second"})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["run"]) for line in lines] == [
        (1, "first"),
        (2, "first"),
        (3, "second"),
    ]


def test_what_is_not_finite_is_null() -> None:
    values = {
        "a": float("nan"),
        "b": {"c": float("inf")},
        "d": torch.tensor(2.5),
        "e": None,
        "f": 3,
    }
    assert as_json(values) == {"a": None, "b": {"c": None}, "d": 2.5, "e": None, "f": 3}
