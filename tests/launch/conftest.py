"""The data tests' tokenizer, for the verbs that take one, and an experiment's plan."""

import json

import pytest

from tests.data.conftest import tokenizer  # noqa: F401
from tests.launch.running import ROOT


@pytest.fixture
def raw() -> dict:
    """The plan of configs/experiments/tiny.json, which can be changed."""
    plan = json.loads((ROOT / "configs" / "experiments" / "tiny.json").read_text())
    return plan | {"base": str(ROOT / "configs" / "demo.json")}
