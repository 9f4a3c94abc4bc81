"""A mistake is told in one form, alone or among others, and crosses processes whole."""

import pickle
from pathlib import Path

import pytest

from l2e import ConfigError, Problem


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("train.steps", 0, "train.steps = 0: too few; give more"),
        ("data.path", "x" * 100, f"data.path = '{'x' * 76}...: too few; give more"),
        ("token file", Path("x.bin"), "token file x.bin: too few; give more"),
        ("--vocab-size", 200, "--vocab-size 200: too few; give more"),
        ("data.path", None, "data.path: too few; give more"),
    ],
)
def test_a_mistake_names_what_was_found(key, value, told):
    assert str(Problem(key, value, "too few", "give more")) == told


def test_mistakes_cross_processes():
    report = ConfigError("run.json", [Problem("train.steps", 0, "too few", "give more")] * 2)
    copy = pickle.loads(pickle.dumps(report))
    assert str(copy) == str(report)
    assert str(copy).startswith("run.json: 2 errors\n  train.steps = 0")
