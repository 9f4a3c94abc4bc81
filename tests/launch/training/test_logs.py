"""What a run writes down: the lines that survive a resume, and numbers that JSON can hold."""

import torch

from launch.training.logs import as_json


def test_what_is_not_finite_is_null() -> None:
    values = {
        "a": float("nan"),
        "b": {"c": float("inf")},
        "d": torch.tensor(2.5),
        "e": None,
        "f": 3,
    }
    assert as_json(values) == {"a": None, "b": {"c": None}, "d": 2.5, "e": None, "f": 3}
