"""Compiled models: every instance, before and after compiling, attached and detached."""

import dataclasses

import pytest
import torch
from torch import nn

import l2e
from tests.l2e.loops.twin import CONFIG, Twin, batches, network, train_both

SILENT = dataclasses.replace(CONFIG, method="silence")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.act, self.b = nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 1)

    def forward(self, x):
        return self.b(self.act(self.a(x)))


def compiled(model, how):
    if how == "method":
        model.compile(backend="eager")
        return model
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("how", ["function", "method"])
def test_arms_of_one_process_differ(how):
    x = batches(1)[0]
    baseline = compiled(Net().train(), how)
    plain = baseline(x)
    before, after = Net().train(), Net().train()
    handle = l2e.attach(before, "act", SILENT)
    run = compiled(before, how)
    assert torch.equal(run(x), before.b.bias.expand(32, 1))
    late = compiled(after, how)
    assert torch.equal(late(x), plain)
    other = l2e.attach(late, "act", SILENT)
    assert other.names == ["act"]
    assert torch.equal(late(x), before.b.bias.expand(32, 1))
    handle.detach()
    assert torch.equal(run(x), plain)
    l2e.attach(before, "act", SILENT)
    assert torch.equal(run(x), before.b.bias.expand(32, 1))
    assert torch.equal(baseline(x), plain)


@pytest.mark.parametrize("method", ["regularize", "none"])
def test_a_compiled_model_trains_as_the_reference(method):
    model = network()
    twin = Twin(model, ["1"], weight=0.5 if method == "regularize" else 0.0)
    handle = l2e.attach(model, "1", dataclasses.replace(CONFIG, method=method))
    run = torch.compile(model, backend="aot_eager", fullgraph=True)

    def loss_of(which, x):
        return (run if which is model else which)(x).square().mean()

    # Nothing is selected by method none: its shares are not compared.
    if method == "none":
        for x in batches(4):
            loss_of(model, x).backward()
            twin.follow([x])
            handle.step()
        assert float(handle.state_dict()["1.samples"]) == 128
    else:
        assert train_both(model, twin, handle, batches(8), loss_of)


def test_inductor_takes_the_operator():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(54, 2)).train()
    twin = Twin(model, ["0"], neuron_dim=1)
    handle = l2e.attach(model, "0", CONFIG, neuron_dim=1)
    run = torch.compile(model)
    x = torch.randn(4, 3, 5, 5).transpose(2, 3)

    def loss_of(which, x):
        return (run if which is model else which)(x).square().mean()

    assert train_both(model, twin, handle, [x * (1 + step / 9) for step in range(4)], loss_of)
