"""`gradient_ratio` in a loop of one's own: the gradients are seen however the loss gets there."""

import copy
from functools import cache

import pytest
import torch
from torch import nn

import l2e
from l2e import L2EConfig
from tests.l2e.loops.twin import batches
from tests.l2e.reference import Reference

RATIO, STEPS, RATE = 0.2, 8, 0.5


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 3)
    ).train()


def objective(model, x):
    return model(x).square().mean()


def together(model, handle, x, scale):
    (scale * (objective(model, x) + handle.loss())).backward()


def accumulated(model, handle, x, scale):
    for part in x.chunk(4):
        (scale * (objective(model, part) + handle.loss()) / 4).backward()


def own_first(model, handle, x, scale):
    loss = objective(model, x)
    (scale * loss).backward(retain_graph=True)
    (scale * handle.loss()).backward()


def ours_first(model, handle, x, scale):
    loss = objective(model, x)
    (scale * handle.loss()).backward(retain_graph=True)
    (scale * loss).backward()


def injected(model, handle, x, scale):
    handle.controller.gradient_scale = scale
    (scale * objective(model, x)).backward()


# Of two backward passes the squares add up and not the gradients, so here no later layer's L_MS.
LAYERS = {own_first: [3], ours_first: [3]}


@cache
def expected(*names):
    """Each step's weights and parameters, in float64 with the method written out."""
    model = copy.deepcopy(network()).double()
    keys = {"late_start": 2, "forget": 3, "inhibited_layers": len(names), "gradient_ratio": RATIO}
    references = {name: Reference(**keys) for name in names}
    seen, found = {}, []

    def split(name, z):
        onward = z.view_as(z)
        onward.retain_grad()
        seen[name] = z, onward
        return onward

    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, z, name=name: split(name, z)
        )
    for x in batches(STEPS, rows=64):
        model.zero_grad()
        loss = objective(model, x.double())
        values = {name: z.detach().numpy() for name, (z, _) in seen.items()}
        for name, (z, _) in seen.items():
            loss = loss + (torch.from_numpy(references[name].loss_slope(values[name])) * z).sum()
        loss.backward()
        found.append([references[name].weight for name in names])
        for name, (_, onward) in seen.items():
            if references[name].tau is not None:
                references[name].compare(values[name], onward.grad.numpy())
            references[name].step(values[name])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad
    return found, [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("kernels", ["auto", "plain"])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize(
    "loop", [together, accumulated, own_first, ours_first, injected], ids=lambda loop: loop.__name__
)
def test_the_weights_are_the_reference_s(loop, scale, kernels):
    layers = LAYERS.get(loop, [1, 3])
    weights, parameters = expected(*map(str, layers))
    model = network()
    config = L2EConfig(
        layers=layers, late_start_step=2, forget_step=3, gradient_ratio=RATIO, kernels=kernels
    )
    handle = l2e.attach(model, "?", config, inject=loop is injected)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for x, wanted in zip(batches(STEPS, rows=64), weights, strict=True):
        optimizer.zero_grad()
        loop(model, handle, x, scale)
        for parameter in model.parameters():
            parameter.grad /= scale
        optimizer.step()
        handle.step()
        found = [metrics["weight"] for metrics in handle.metrics().values()]
        assert found == pytest.approx(wanted, rel=1e-4)
    assert weights[-1][0] > 2 * weights[0][0]
    for mine, theirs in zip(model.parameters(), parameters, strict=True):
        torch.testing.assert_close(mine.detach().double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_squares_of_two_backward_passes_are_told(recwarn, kernels):
    """Gradients of two losses through one forward pass are not independent."""
    config = L2EConfig(layers=[3], late_start_step=2, gradient_ratio=RATIO, kernels=kernels)
    for passes in (1, 2):
        model = network()
        handle = l2e.attach(model, "?", config)
        recwarn.clear()
        for x in batches(STEPS, rows=64):
            output = model(x)
            losses = [output.square().mean(), output.mean(), handle.loss()]
            if passes == 1:
                sum(losses).backward()
            else:
                for number, loss in enumerate(losses, 1):
                    loss.backward(retain_graph=number < len(losses))
            handle.step()
        told = [str(one.message) for one in recwarn if "second backward pass" in str(one.message)]
        assert bool(told) == (passes == 2), told


def test_of_a_masked_batch_the_gradients_of_what_counts_are_compared():
    """The backward pass of the selected entries alone, and the one over all, find the same."""
    found = []
    for kernels in ("auto", "plain"):
        config = L2EConfig(
            layers=[3], late_start_step=2, gradient_ratio=RATIO, kernels=kernels, forget_step=3
        )
        model = network()
        handle = l2e.attach(model, "?", config)
        for x in batches(STEPS, rows=64):
            handle.mask(torch.arange(64) % 3 > 0)
            (objective(model, x) + handle.loss()).backward()
            handle.step()
        found.append(next(iter(handle.metrics().values()))["weight"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    model = network()
    handle = l2e.attach(model, "?", config)
    for x in batches(STEPS, rows=64):
        (objective(model, x) + handle.loss()).backward()
        handle.step()
    unmasked = next(iter(handle.metrics().values()))["weight"]
    assert found[0] != pytest.approx(unmasked, rel=1e-2)
