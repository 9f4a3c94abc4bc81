"""Averaged copies and mean teachers: what they compute is not the model's own."""

import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import l2e
from tests.l2e.loops.twin import CONFIG, Twin, batches, network, no_warnings, train_both


@pytest.mark.parametrize("kind", ["deepcopy", "AveragedModel"])
@pytest.mark.parametrize("copied_first", [False, True])
def test_a_teacher_does_not_feed_the_statistics(kind, copied_first):
    model = network()
    twin = Twin(model, ["1"])

    def average():
        if kind == "deepcopy":
            return copy.deepcopy(model)
        return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))

    teacher = average() if copied_first else None
    handle = l2e.attach(model, "1", CONFIG)
    teacher = teacher or average()

    def loss_of(which, x):
        out = which(x)
        if which is model:
            with torch.no_grad():
                teacher(50 + x)
        return out.square().mean()

    with no_warnings():
        assert train_both(model, twin, handle, batches(8), loss_of)
    if kind == "AveragedModel":
        teacher.update_parameters(model)
    handle.detach()
    assert not any(module._forward_hooks for module in teacher.modules())
