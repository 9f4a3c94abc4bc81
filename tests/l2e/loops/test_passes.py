"""Passes that are not training, and modules and steps that nothing reaches."""

import copy
import dataclasses
import warnings

import pytest
import torch
from torch import nn

import l2e
from l2e import L2EConfig
from tests.l2e.loops.twin import (
    CONFIG,
    assert_same_gradients,
    batches,
    loss_of,
    network,
    no_warnings,
    observed,
    train,
    watch,
)

# Passes that are not training.


@pytest.mark.parametrize("passing", ["paused", "no_grad", "inference", "eval"])
def test_passes_that_are_not_training_are_neither_counted_nor_changed(passing):
    config = dataclasses.replace(CONFIG, method="deactivate")
    model, handle, x = observed(config)
    other, plain = copy.deepcopy(model), observed(config)
    inside = {
        "paused": handle.paused,
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "eval": torch.enable_grad,
    }[passing]
    model.train(passing != "eval")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = other(x)
    with inside():
        assert torch.equal(model(x), expected)
    model.train()
    assert not torch.equal(model(x), expected)
    handle.step()
    plain_model, plain_handle, _ = plain
    watch(plain_model, plain_handle, [x])
    state, expected_state = handle.state_dict(), plain_handle.state_dict()
    assert all(torch.equal(state[name], expected_state[name]) for name in state)


@pytest.mark.parametrize("inside", [torch.no_grad, torch.inference_mode])
def test_passes_without_gradients_count_where_asked(inside):
    model = network()
    handle = l2e.attach(model, "1", CONFIG, observe_no_grad=True)
    with inside():
        model(batches(1)[0])
    handle.step()
    assert float(handle.state_dict()["1.samples"]) == 32
    (loss_of(model, batches(1)[0]) + handle.loss()).backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_passes_count_once(reentrant):
    found = []
    for checkpointed in (False, True):
        model = network()
        handle = l2e.attach(model, "1", CONFIG, inject=True)
        for x in batches(4):
            model.zero_grad()
            x.requires_grad_()
            out = (
                torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
                if checkpointed
                else model(x)
            )
            out.square().mean().backward()
            handle.step()
        found.append((model, handle.state_dict()))
    (plain, state), (other, other_state) = found
    assert float(state["1.tau"]) > 0
    assert_same_gradients(other, plain, 1e-6)
    assert all(torch.equal(state[name], other_state[name]) for name in state)


def test_reentrant_checkpointing_without_injection_is_refused():
    model = network()
    l2e.attach(model, "1", CONFIG)
    x = batches(1)[0].requires_grad_()
    with pytest.raises(ValueError, match=r"module 1 .*reentrant.*use_reentrant=False, or"):
        torch.utils.checkpoint.checkpoint(model, x, use_reentrant=True)


# Nothing observed, and loss() forgotten.


def test_modules_that_nothing_reaches_are_named():
    model = nn.ModuleDict({"a": nn.Linear(4, 8), "b": nn.Linear(4, 8), "c": nn.Linear(4, 8)})
    model["b"].eval()
    handle = l2e.attach(model, "?", CONFIG)
    for module in ("a", "b"):
        model[module](batches(1)[0])
    with pytest.warns(UserWarning, match=r"b in eval mode.*c never called.*all 3 matched"):
        handle.step()
    metrics = handle.metrics()
    assert list(metrics) == ["a", "b", "c"]
    assert metrics["c"].keys() == metrics["a"].keys()
    assert all(value != value for value in metrics["b"].values())
    saved = handle.state_dict()
    handle.detach()
    restored = l2e.attach(model, "?", CONFIG)
    restored.load_state_dict(saved)
    assert restored.state_dict().keys() == saved.keys()


@pytest.mark.parametrize("inject", [False, True])
def test_what_is_frozen_is_told_once(inject):
    model = nn.Sequential(nn.Linear(4, 4), network()).train()
    model[:1].requires_grad_(False)
    handle = l2e.attach(model, "0", CONFIG, inject=inject)
    with pytest.warns(UserWarning, match=r"before module 0, .*no gradient.*Unfreeze") as told:
        train(model, handle, batches(3))
    assert len(told) == 1


def test_a_step_without_a_pass_is_told_once():
    model, handle, x = observed()

    def step_twice():
        for _ in range(3):
            train(model, handle, [x])
            handle.step()

    with pytest.warns(UserWarning, match=r"no attached module was called.*after each") as told:
        step_twice()
    assert len(told) == 1


def test_a_model_left_in_eval_mode_is_told_once():
    model = network()
    handle = l2e.attach(model, "1", L2EConfig(method="none", layers="all"))
    with no_warnings():
        watch(model, handle, batches(2))
    model.eval()  # to validate; and then forgotten
    with pytest.warns(UserWarning, match=r"in eval mode.*model\.train") as told:
        watch(model, handle, batches(3))
    assert len(told) == 1


def test_a_loss_that_is_never_taken_is_told():
    model = network()
    handle = l2e.attach(model, "1", CONFIG)
    with pytest.warns(UserWarning, match=r"handle\.loss\(\) was not called"):
        watch(model, handle, batches(4))


def test_without_surprises_there_are_no_warnings():
    with no_warnings():
        for keys in ({}, {"inject": True}):
            observed(steps=15, **keys)
