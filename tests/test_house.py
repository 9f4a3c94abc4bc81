"""The check of the imports finds what it is there for."""

from pathlib import Path

import pytest

from tests import house

TIDY = {
    "l2e/layer.py": "import torch\ndef _made(): ...\nclass Layer:\n    _parts = ()",
    "bench/speed.py": "import torch\ntorch._dynamo.reset()\ndef _made(): ...\n_made()",
    "data/corpus.py": "from l2e.layer import Layer",
    "launch/engine/engine.py": "def build():\n    from data import corpus",
    "launch/pretrain.py": "from launch.engine.engine import build",
}


def complaints(root: Path, changes: dict[str, str]) -> list[str]:
    for name, text in (TIDY | changes).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return house.wrong_in(root)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"l2e/layer.py": "import data.corpus"}, "l2e may not import data"),
        ({"data/index.py": "import launch.engine.engine"}, "data may not import launch.engine"),
        (
            {"launch/engine/layout.py": "def f():\n    from launch.training import loop",
             "launch/training/loop.py": ""},
            "launch.engine may not import launch.training",
        ),
        ({"data/index.py": "import data.nowhere"}, "data.nowhere, which does not exist"),
        (
            {"data/index.py": "import data.order", "data/order.py": "from data import index"},
            "a circle: data.index imports data.order imports data.index",
        ),
        ({"data/index.py": "from l2e.layer import _made"}, "data/index.py:1 uses _made"),
        ({"tests/test_layer.py": "layer.Layer()._parts"}, "tests/test_layer.py:1 uses _parts"),
        ({"bench/speed.py": "\nmonkey.setattr(layer, '_made', 5)"}, "bench/speed.py:2 uses _made"),
    ],
)  # fmt: skip
def test_each_disorder_is_told(tmp_path: Path, changes: dict[str, str], told: str) -> None:
    assert any(told in line for line in complaints(tmp_path, changes))


def test_a_tidy_house_has_none(tmp_path: Path) -> None:
    only_for_types = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from data import corpus"
    )
    changes = {
        "data/order.py": only_for_types,
        "data/corpus.py": "from l2e.layer import Layer\nfrom data import order",
    }
    assert complaints(tmp_path, changes) == []
    assert house.wrong_in(house.ROOT) == []
