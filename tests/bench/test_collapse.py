"""The guard's numbers side by side, on a run short enough for a test."""

import math
from pathlib import Path

import torch

from bench.collapse import Trial, run, tail_by_scale

BRIEF = Trial(steps=30, layers=2, hidden=32, length=32, late_start=5, weight=0.05)


def test_the_numbers_tell_the_arms_apart(capsys):
    text = bytearray(Path(__file__).read_bytes() * 20)
    data = torch.frombuffer(text, dtype=torch.uint8).long()
    arms = ("weight 0", "plain", "scale invariant", "silence")
    rows = {arm: run(arm, data, BRIEF, progress=False) for arm in arms}
    with capsys.disabled():
        for arm, row in rows.items():
            print(f"\n{arm:22}", *(f"{name} {value:.4f}" for name, value in row.items()), end="")
    assert all(math.isfinite(value) for row in rows.values() for value in row.values())
    # A silenced MLP adds its bias alone, and hands nothing else to the held-out loss.
    assert rows["silence"]["mlp_to_residual"] < 0.3 * rows["weight 0"]["mlp_to_residual"]
    # The hazard: the plain loss is lowered by shrinking the layer.
    assert rows["plain"]["std"] < rows["weight 0"]["std"]
    assert rows["plain"]["std"] < rows["scale invariant"]["std"]


def test_gelu_lets_a_live_variance_loss_fall_by_shrinking_what_enters_it():
    """Scale-free in z, not before GELU, which grows linear, so lighter-tailed, near zero."""
    by_scale = tail_by_scale(torch.nn.functional.gelu)
    assert by_scale["0.1"] < by_scale["0.3"] < by_scale["1.0"]
    linear = tail_by_scale(lambda values: values)
    assert max(linear.values()) - min(linear.values()) < 1e-4
