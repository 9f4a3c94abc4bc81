"""Layers that are left out of some steps: every layer has a start of its own."""

import dataclasses

import pytest
import torch
from torch import nn

import l2e
from tests.l2e.loops.twin import CONFIG, Twin, batches, network, train_both, watch


class Dropped(nn.Module):
    """Two residual blocks, the second left out of the steps in `left_out`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 4)) for _ in range(2)
        )
        self.step = -1
        self.left_out = ()

    def forward(self, x):
        self.step += 1
        for number, block in enumerate(self.blocks):
            if number == 0 or self.step not in self.left_out:
                x = x + block(x)
        return x


@pytest.mark.parametrize(
    "left_out",
    [
        (1,),  # the step in which tau starts
        (1, 2, 5),
        range(4),  # first called long after the late start
        range(0, 12, 2),
    ],
)
def test_a_layer_takes_its_start_from_its_own_first_usable_step(left_out):
    model = Dropped().train()
    model.left_out = left_out
    names = ["blocks.0.1", "blocks.1.1"]
    twin = Twin(model, names)
    handle = l2e.attach(model, "blocks.*.1", CONFIG)
    assert train_both(model, twin, handle, batches(12))
    assert all(reference.tau for reference in twin.references.values())


@pytest.mark.parametrize("bad_step", [0, 1, 3])
def test_a_step_with_a_nan_is_no_start(bad_step):
    model = network()
    twin = Twin(model, ["1"])
    handle = l2e.attach(model, "1", CONFIG)
    for step, x in enumerate(batches(6)):
        if step == bad_step:
            x[3] = float("nan")
        twin.follow([x])
        watch(model, handle, [x])
        if step == bad_step:
            with pytest.raises(ValueError, match=rf"layer 1: NaN.*step {step}.*handle\.discard"):
                handle.metrics()
    assert handle.metrics()["1"]["tau"] == pytest.approx(twin.references["1"].tau, rel=1e-4)


@pytest.mark.parametrize("rows", [(1,) * 10, (1, 32, 1, 32, 32, 1, 32)])
def test_steps_of_one_row_are_the_references(rows):
    model = network()
    twin = Twin(model, ["1"])
    handle = l2e.attach(model, "1", CONFIG)
    inputs = [x[:count] for x, count in zip(batches(len(rows)), rows, strict=True)]
    assert train_both(model, twin, handle, inputs)


@pytest.mark.parametrize("selection", ["threshold", "topk"])
@pytest.mark.parametrize("kind", ["one row", "constant"])
def test_a_layer_starts_from_statistics_with_a_variance(kind, selection):
    """One sample, or a layer whose units are dead, has no MS to select by."""
    model, config = network(), dataclasses.replace(CONFIG, selection=selection)
    handle = l2e.attach(model, "1", config)
    whole = batches(6, seed=9)
    for x in [x[:1] if kind == "one row" else torch.zeros(8, 4) for x in batches(1)] + whole:
        model(x)
        handle.step()
        if x is whole[0]:
            assert handle.metrics()["1"]["tau"] == float("inf")
            model(whole[2])
            assert (handle.loss() != 0) == (selection == "topk")
            handle.discard()
    if selection == "threshold":
        assert 2 < handle.metrics()["1"]["tau"] < 20


def test_a_state_without_tau_finds_it_under_an_earlier_late_start():
    model = network()
    late = l2e.attach(model, "1", l2e.L2EConfig(late_start_step=50, layers="all"))
    watch(model, late, batches(5))
    late.detach()
    handle = l2e.attach(model, "1", CONFIG)
    handle.load_state_dict(late.state_dict())
    watch(model, handle, batches(1))
    assert 3 < handle.metrics()["1"]["tau"] < 10


def test_a_layer_without_tau_ten_steps_later_is_warned_of():
    model = Dropped().train()
    model.left_out = range(1, 100)
    handle = l2e.attach(model, "blocks.*.1", CONFIG)
    with pytest.warns(UserWarning, match=r"nothing is selected in layers blocks\.1\.1, 10 steps"):
        watch(model, handle, batches(12))
