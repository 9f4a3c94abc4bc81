"""Several micro-batches a step: by hand, and with an optimizer that says when a step is one."""

import pytest
import torch

import l2e
from tests.l2e.loops.twin import (
    CONFIG,
    Twin,
    assert_same_parameters,
    assert_same_statistics,
    batches,
    loss_of,
    network,
)


@pytest.mark.parametrize("follows", [False, True])
@pytest.mark.parametrize("micro_batches", [2, 3])  # of 8 batches: 3 leave a shorter last window
def test_micro_batches_are_one_step(follows, micro_batches):
    model = network()
    twin = Twin(model, ["1"])
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin.model)]
    handle = l2e.attach(model, "1", CONFIG, optimizer=optimizers[0] if follows else None)
    data = batches(8)
    for start in range(0, len(data), micro_batches):
        window = data[start : start + micro_batches]
        for x in window:
            ((loss_of(model, x) + handle.loss()) / len(window)).backward()
            ((loss_of(twin.model, x) + twin.pull()) / len(window)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if not follows:
            handle.step()
        shares = twin.step()
        assert_same_statistics(handle, twin, shares)
    assert_same_parameters(model, twin.model)
    assert twin.references["1"].updates > 0


def test_a_handle_that_follows_an_optimizer_is_not_stepped_by_hand():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = l2e.attach(model, "1", CONFIG, optimizer=optimizer)
    with pytest.raises(ValueError, match="steps by itself"):
        handle.step()
    handle.detach()
    optimizer.step()
    assert handle.controller.phase.step == 0
    with pytest.raises(ValueError, match="optimizer is a Scheduler"):
        l2e.attach(model, "1", CONFIG, optimizer=type("Scheduler", (), {})())


@pytest.mark.parametrize("follows", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
def test_a_batch_that_a_closure_evaluates_again_counts_once(follows, by_name):
    """LBFGS does so; what is evaluated again is inhibited like the first."""
    model = network()
    twin = Twin(model, ["1"])
    optimizers = [
        torch.optim.LBFGS(m.parameters(), lr=0.01, max_iter=3) for m in (model, twin.model)
    ]
    handle = l2e.attach(model, "1", CONFIG, optimizer=optimizers[0] if follows else None)
    for x in batches(6):

        def closure(x=x):
            optimizers[0].zero_grad()
            loss = loss_of(model, x) + handle.loss()
            loss.backward()
            return loss

        def twins(x=x):
            optimizers[1].zero_grad()
            loss = loss_of(twin.model, x) + twin.pull()
            del twin.seen["1"][1:]
            loss.backward()
            return loss

        for optimizer, evaluate in zip(optimizers, (closure, twins), strict=True):
            optimizer.step(**{"closure": evaluate}) if by_name else optimizer.step(evaluate)
        if not follows:
            handle.step()
        assert_same_statistics(handle, twin, twin.step())
    assert_same_parameters(model, twin.model)
    assert twin.references["1"].updates > 0
