"""What a run writes down: the lines that survive a resume, and numbers that JSON can hold."""

import json

import torch

from launch.training.logs import MetricsFile, as_json


def test_what_is_not_finite_is_null() -> None:
    values = {
        "a": float("nan"),
        "b": {"c": float("inf")},
        "d": torch.tensor(2.5),
        "e": None,
        "f": 3,
    }
    assert as_json(values) == {"a": None, "b": {"c": None}, "d": 2.5, "e": None, "f": 3}


def test_a_line_that_is_written_can_be_added_to(tmp_path) -> None:
    """Where another step's line is the last, nothing is lost."""
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in (9, 99):
        file.write({"step": step, "loss": 1.0})
    file.rewrite({"step": 99, "loss": 1.0, "scores": {"sciq": 0.5}})
    MetricsFile(path).rewrite({"step": 9, "loss": 2.0})  # not the last one's step
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert found == [
        {"step": 9, "loss": 1.0},
        {"step": 99, "loss": 1.0, "scores": {"sciq": 0.5}},
        {"step": 9, "loss": 2.0},
    ]
