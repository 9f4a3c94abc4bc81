"""The kernels as GPUs would run them, compiled with none at hand: no spills, few instructions.

A process of its own, for the other tests interpret the kernels.
"""

import json

import pytest

from tests.launch.running import succeeds

pytest.importorskip("triton")

PROGRAM = """
import json
from bench import aot

rows = [
    aot.layer_row(target, "bf16", *variant)
    for target in aot.TARGETS
    for variant in aot.layer_variants("bf16")
]
losses = [row for target in aot.TARGETS for row in aot.loss_rows(target, "bf16")]
worth = {preset: aot.weight_gradient_bytes(preset) for preset in aot.SHAPES}
print(json.dumps({"layer": rows, "loss": losses, "weight_gradient": worth}))
"""


@pytest.fixture(scope="module")
def compiled() -> dict:
    return json.loads(succeeds("-c", PROGRAM).stdout)


def test_nothing_is_spilled_and_accesses_are_wide(compiled):
    assert len(compiled["layer"]) > 90
    for row in compiled["layer"] + compiled["loss"]:
        assert row["spills"] == row["stack"] == 0, row
    for row in compiled["layer"]:
        assert row["widest"] == "128", row
        # So that a multiprocessor runs as many programs of 64 threads as the grid counts on.
        programs = 11 if row["name"].endswith("compared") else 12
        assert row["registers"] <= 65536 / 64 / programs, row


def test_an_activation_takes_at_most_45_instructions(compiled):
    rows = [row for row in compiled["layer"] if row["target"] == "sm_90"]
    assert max(row["instructions_per_activation"] for row in rows) <= 45


def test_activations_and_logits_are_read_and_written_as_often_as_they_must(compiled):
    moved = {
        row["name"]: row["bytes_per_activation"]
        for row in compiled["layer"]
        if row["target"] == "sm_90"
    }
    assert moved["forward gelu regularize"] == 4  # bf16 in and out
    assert moved["backward gelu regularize"] == 6  # two in, one out
    assert moved["measure gelu"] == 2
    softmax = sum(r["bytes_per_logit"] for r in compiled["loss"] if r["target"] == "sm_90")
    assert softmax == 6
    assert softmax + max(compiled["weight_gradient"].values()) <= 8
