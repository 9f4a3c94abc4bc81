"""The plain loop: statistics, L_MS and gradients, the loss, the memory that is kept."""

import dataclasses

import pytest
import torch
from torch import nn

import l2e
from tests.l2e.loops.twin import (
    CONFIG,
    Twin,
    assert_same_statistics,
    batches,
    loss_of,
    network,
    observed,
    train,
    train_both,
    watch,
)


@pytest.mark.parametrize("scale_invariant", [False, True])
def test_training_equals_the_reference(scale_invariant):
    model = network()
    twin = Twin(model, ["1"], scale_invariant=scale_invariant)
    config = dataclasses.replace(CONFIG, scale_invariant=scale_invariant)
    handle = l2e.attach(model, "1", config)
    assert train_both(model, twin, handle, batches(12))


@pytest.mark.parametrize("act", [nn.Tanh(), nn.ReLU(inplace=True), nn.Softmax(-1), nn.Identity()])
def test_functions_that_keep_their_result_for_the_backward_pass(act):
    model = nn.Sequential(nn.Linear(4, 16), act, nn.Linear(16, 3)).train()
    twin = Twin(model, ["1"])
    handle = l2e.attach(model, "1", CONFIG)
    assert train_both(model, twin, handle, batches(8))


@pytest.mark.parametrize("inject", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_measuring_changes_nothing(inject, dtype):
    """A measured step compares gradients, for which it takes the dense way."""
    found = []
    for measured in (False, True):
        model = network().to(dtype)
        handle = l2e.attach(model, "1", CONFIG, inject=inject)
        handle.controller.measure = measured
        for x in batches(6):
            model.zero_grad()
            (loss_of(model, x.to(dtype)) + handle.loss()).backward()
            handle.step()
        found.append(([p.grad for p in model.parameters()], handle.state_dict()))
    (plain, state), (other, other_state) = found
    tolerance = 2**-6 if dtype is torch.bfloat16 else 0.0  # rounded once or twice
    for mine, theirs in zip(plain, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance / 10)
    assert all(torch.equal(state[name], other_state[name]) for name in state)


def kept_bytes(model, x):
    """Of all tensors that autograd keeps for the backward pass, each storage once."""
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x).sum()
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("layers", [1, 4])
def test_no_activation_is_kept_beside_autograds_own(layers):
    """Only what is selected is: 2 % of the entries, with their places."""
    blocks = [m for _ in range(layers) for m in (nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))]
    model = nn.Sequential(*blocks).train()
    x = torch.randn(500, 64)
    plain = kept_bytes(model, x)
    handle = l2e.attach(model, "*[147]", CONFIG)
    for _ in range(4):
        (model(x).mean() + handle.loss()).backward()
        handle.step()
    kept = kept_bytes(model, x)
    share = handle.metrics()["1"]["selected_fraction"]
    assert share > 0
    activations = layers * 500 * 256 * 4
    assert kept - plain < 6 * share * activations + 1000 * layers


def test_loss_is_the_same_until_the_next_forward():
    model, handle, x = observed()
    task = loss_of(model, x)
    first = handle.loss()
    assert first.item() != 0
    assert handle.loss().item() == first.item()
    (task + first).backward()
    assert handle.loss().item() == first.item()
    handle.step()
    assert handle.loss().item() == first.item()
    model(2 * x)
    assert handle.loss().item() != first.item()


@pytest.mark.parametrize("logging", [torch.no_grad, torch.inference_mode])
def test_a_loss_that_is_logged_first_still_inhibits(logging):
    model = network()
    twin = Twin(model, ["1"])
    handle = l2e.attach(model, "1", CONFIG)

    def logged(module, x):
        loss = loss_of(module, x)
        with logging():
            float(handle.loss())
        return loss

    assert train_both(model, twin, handle, batches(6), logged)


def test_a_validation_loss_has_no_l_ms():
    model, handle, x = observed()
    loss_of(model, x)
    trained = handle.loss().item()
    model.eval()
    assert handle.loss().item() == trained != 0
    with torch.no_grad():
        model(x)
    assert handle.loss().item() == 0
    loss_of(model.train(), x)
    loss_of(model.eval(), x)
    assert handle.loss().item() == trained  # of the training pass before
    model.train()
    assert handle.loss().item() == trained


@pytest.mark.parametrize("act", [nn.GELU(), nn.Unflatten(1, (16,))])  # a view is served otherwise
def test_a_second_backward_pass_would_inject_twice(act):
    model = network()
    model[1] = act
    l2e.attach(model, "1", CONFIG, inject=True)
    loss = loss_of(model, batches(1)[0])
    loss.backward(retain_graph=True)
    with pytest.raises(ValueError, match=r"layer 1: a second backward pass .*handle\.loss\(\)"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["rows", "view", "masked", "measured"])
def test_the_default_dtype_is_not_the_methods(dtype, kind):
    model = network()
    if kind == "view":
        model[1] = nn.Unflatten(1, (16,))
    twin, inputs = Twin(model, ["1"]), batches(6)
    try:
        torch.set_default_dtype(dtype)
        handle = l2e.attach(model, "1", CONFIG)
        handle.controller.measure = kind == "measured"
        if kind == "masked":
            handle.mask(torch.ones(32, dtype=torch.bool))
        train(model, handle, inputs)
        state = handle.state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {value.dtype for value in state.values()} == {torch.int64, torch.float32}
    twin.follow(inputs)
    assert_same_statistics(handle, twin)


def test_a_discarded_batch_leaves_no_trace():
    states = []
    for bad in (None, float("nan"), 1e3):
        model, handle, x = observed()
        if bad is not None:
            model(bad * x)
            handle.discard()
        model(x)
        handle.step()
        handle.metrics()
        states.append(handle.state_dict())
    for state in states[1:]:
        assert all(torch.equal(state[name], states[0][name]) for name in states[0])


def test_a_discarded_first_batch_takes_its_centre_with_it():
    model = network()
    twin = Twin(model, ["1"])
    handle = l2e.attach(model, "1", CONFIG)
    model(batches(1)[0] * 1e5)
    handle.discard()
    assert train_both(model, twin, handle, batches(6))


@pytest.mark.parametrize("first_call", [0, 3])
def test_a_large_mean_costs_no_precision(first_call):
    model = nn.Sequential(nn.Identity(), nn.Identity()).train()
    handle = l2e.attach(model, "?", CONFIG)
    generator = torch.Generator().manual_seed(0)
    seen = []
    for step in range(first_call + 4):
        x = 10_000 + torch.randn(256, 8, generator=generator)
        model[0](x)
        if step >= first_call:
            model[1](x)
            seen.append(x.double())
        handle.step()
    expected = torch.cat(seen).var(0)
    found = handle.state_dict()["1.var"].double()
    assert ((found - expected).abs() / expected).max() < 1e-4


@pytest.mark.parametrize("delta", [-1.0, 0.0, 0.5, 5.0])
@pytest.mark.parametrize("neuron_dim", [-1, 1])
def test_deactivated_entries_are_means_with_a_gradient_of_their_own(delta, neuron_dim):
    config = dataclasses.replace(CONFIG, method="deactivate", delta=delta)
    torch.manual_seed(0)
    first, x = {
        -1: (nn.Linear(4, 16), torch.randn(64, 4)),
        1: (nn.Conv2d(3, 6, 3), torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)),
    }[neuron_dim]
    model = nn.Sequential(first, nn.GELU()).train()
    handle = l2e.attach(model, "1", config, neuron_dim=neuron_dim)
    watch(model, handle, [torch.randn_like(x) for _ in range(4)])
    state = {name: tensor.double() for name, tensor in handle.state_dict().items()}
    mean, var, tau = (state[f"1.{name}"] for name in ("mean", "var", "tau"))
    x.mul_(1.3).requires_grad_()
    with handle.paused():
        plain = model(x)
    z = plain.double().movedim(neuron_dim, -1)
    chosen = (z - mean) ** 2 / (var + config.eps * var.mean()) >= tau
    assert 5 < chosen.sum() < chosen.numel() / 4
    expected = torch.where(chosen, mean, z).movedim(-1, neuron_dim)
    factor = torch.where(chosen, -delta, 1.0).movedim(-1, neuron_dim)
    out, arriving = model(x), torch.randn(plain.shape)
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)
    [found] = torch.autograd.grad(out, x, arriving)
    [wanted] = torch.autograd.grad(plain, x, (arriving * factor).float())
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("method", "each"), [("none", 0), ("regularize", 8), ("deactivate", 4)])
def test_memory_for_the_backward_pass_is_that_of_the_selected_entries(method, each):
    """So many bytes for each, and one entry, beside what autograd keeps without the method."""
    model = network(units=64)
    handle = l2e.attach(model, "1", dataclasses.replace(CONFIG, method=method))
    inputs = batches(5, rows=256)
    train(model, handle, inputs)
    with handle.paused():
        plain = kept_bytes(model, inputs[-1])
    added = kept_bytes(model, inputs[-1]) - plain
    handle.step()
    selected = handle.metrics()["1"]["selected_fraction"] * 256 * 64
    assert selected > 100
    assert added == pytest.approx(each * selected + (4 if each else 0), abs=1)
