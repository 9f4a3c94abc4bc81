"""What a loop with `l2e.attach` has to give: a twin of the model, trained beside it without the
method, whose L_MS and statistics come from the float64 reference."""

import copy
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

import l2e
from l2e import L2EConfig
from tests.l2e.reference import Reference

SETTINGS = {"late_start_step": 2, "weight": 0.5}
CONFIG = L2EConfig(layers="all", **SETTINGS)


def network(seed=0, units=16):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, units), nn.GELU(), nn.Linear(units, 3)).train()


def batches(steps, rows=32, width=4, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, width, generator=generator) for _ in range(steps)]


def loss_of(model, x):
    return model(x).square().mean()


def tokens(steps=5):
    """Batches of ids that a language model of 32 tokens reads."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 32, (4, 16), generator=generator) for _ in range(steps)]


def watch(model, handle, inputs):
    """Steps of forward passes alone."""
    for x in inputs:
        model(x)
        handle.step()


def train(model, handle, inputs):
    """Steps of forward and backward passes, of one batch each, without an optimizer."""
    for x in inputs:
        (loss_of(model, x) + handle.loss()).backward()
        handle.step()


def observed(config=CONFIG, steps=4, **keys):
    """A small network whose handle has its tau, and a batch."""
    model = network()
    handle = l2e.attach(model, "1", config, **keys)
    train(model, handle, batches(steps))
    return model, handle, batches(1, seed=9)[0]


@contextmanager
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class Twin:
    """A copy of a model, made before `attach`, and the reference of each of its layers.

    Args:
        names: of the modules that the method observes in the original.
        neuron_dim, output: as of `attach`; output is a function of the module's output.
    """

    def __init__(self, model, names, neuron_dim=-1, output=lambda out: out, **settings):
        self.model = copy.deepcopy(model)
        self.names = list(names)
        settings = {"late_start": 2, "weight": 0.5, "forget": 100} | settings
        self.references = {n: Reference(inhibited_layers=len(names), **settings) for n in names}
        self.calls = {n: [] for n in names}
        self.seen = {n: [] for n in names}
        for name in names:
            self.model.get_submodule(name).register_forward_hook(
                lambda module, args, out, name=name: self.calls[name].append(
                    output(out).movedim(neuron_dim, -1)
                )
            )

    def forget(self):
        """The calls since the last `pull` are not the method's."""
        for calls in self.calls.values():
            calls.clear()

    def pull(self, counts=None):
        """L_MS's gradient, as a loss linear in the activations of the calls since the last.

        Its value is kept as `loss`.

        Args:
            counts: [..., ] true where a sample counts; None: everywhere.
        """
        total = torch.zeros(())
        self.loss = 0.0
        for name, calls in self.calls.items():
            kept = [call.flatten(0, -2) if counts is None else call[counts] for call in calls]
            calls.clear()
            if not kept or not sum(map(len, kept)):
                continue
            z = torch.cat(kept)
            values = z.detach().double().numpy()
            self.seen[name].append(values)
            self.loss += self.references[name].loss(values)
            slope = self.references[name].loss_slope(values)
            total = total + (torch.from_numpy(slope).float() * z).sum()
        return total

    def step(self):
        """Merge what `pull` saw; returns each layer's selected share."""
        shares = {}
        for name, seen in self.seen.items():
            reference = self.references[name]
            z = np.concatenate(seen) if seen else np.zeros((0, 1))
            shares[name] = reference.selected(z).mean() if len(z) else 0.0
            reference.step(z)
            seen.clear()
        return shares

    def train(self, windows, lr=0.1):
        """Steps of SGD, each of a window of batches; returns the last one's selected shares."""
        optimizer = torch.optim.SGD(self.model.parameters(), lr=lr)
        for window in windows:
            optimizer.zero_grad()
            for x in window:
                ((loss_of(self.model, x) + self.pull()) / len(window)).backward()
            optimizer.step()
            shares = self.step()
        return shares

    def follow(self, inputs):
        """Steps of forward passes alone."""
        for x in inputs:
            self.model(x)
            self.pull()
            self.step()


def assert_same_parameters(model, twin, tolerance=2e-4):
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance / 10, msg=name)


def assert_same_gradients(model, twin, tolerance=2e-4):
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None:
            difference = (mine.grad - theirs.grad).norm()
            assert difference <= tolerance * theirs.grad.norm() + 1e-7, name


def assert_same_moments(state, name, reference):
    assert float(state[f"{name}.samples"]) == reference.m
    if reference.m:
        np.testing.assert_allclose(state[f"{name}.mean"], reference.mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state[f"{name}.var"], reference.var, rtol=1e-4)


def assert_same_statistics(handle, twin, shares=None):
    state, metrics = handle.state_dict(), handle.metrics()
    for name, reference in twin.references.items():
        assert_same_moments(state, name, reference)
        if reference.m == 0:
            continue
        tau = float("inf") if reference.tau is None else reference.tau
        assert metrics[name]["tau"] == pytest.approx(tau, rel=1e-4)
        if shares is not None:
            assert metrics[name]["selected_fraction"] == pytest.approx(shares[name], rel=1e-5)


def train_both(model, twin, handle, inputs, loss_of=loss_of, lr=0.05):
    """The plain loop on both; compares after every step and says whether anything was selected."""
    optimizers = [torch.optim.SGD(m.parameters(), lr=lr) for m in (model, twin.model)]
    selected = 0.0
    for x in inputs:
        for optimizer in optimizers:
            optimizer.zero_grad()
        (loss_of(model, x) + handle.loss()).backward()
        (loss_of(twin.model, x) + twin.pull()).backward()
        assert float(handle.loss()) == pytest.approx(twin.loss, rel=1e-4, abs=1e-6)
        assert_same_gradients(model, twin.model)
        for optimizer in optimizers:
            optimizer.step()
        handle.step()
        shares = twin.step()
        selected += sum(shares.values())
        assert_same_statistics(handle, twin, shares)
    return selected > 0
