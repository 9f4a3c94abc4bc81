"""A mixture of experts: each sees its share of the tokens, now and then none."""

import dataclasses

import pytest
import torch
from torch import nn

import l2e
from l2e import backends
from tests.l2e.loops.twin import CONFIG, Twin, batches, network, train_both


class Experts(nn.Module):
    """Tokens go to the expert that their first entry's size names; always called, maybe empty."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 4)) for _ in range(3)
        )

    def forward(self, x):
        number = (x[:, 0].abs() / 0.7).long().clamp(max=2)
        out = torch.zeros_like(x)
        for expert, module in enumerate(self.experts):
            chosen = number == expert
            out[chosen] = module(x[chosen])
        return out


def data(steps):
    """In some steps no token is for the last expert, in others none for the first."""
    for step, x in enumerate(batches(steps, rows=64)):
        if step % 3 == 0:
            x[:, 0] = x[:, 0].clamp(-1.3, 1.3)
        if step % 4 == 1:
            x[:, 0] = 0.8 + x[:, 0].abs()
        yield x


def test_experts_without_tokens_contribute_nothing():
    model = Experts().train()
    names = [f"experts.{n}.1" for n in range(3)]
    twin = Twin(model, names)
    handle = l2e.attach(model, "experts.*.1", CONFIG)
    assert train_both(model, twin, handle, data(10))


@pytest.mark.parametrize("selection", ["threshold", "topk", "random"])
@pytest.mark.parametrize("method", ["none", "regularize", "deactivate", "silence"])
@pytest.mark.parametrize("axes", ["unit", "position"])
def test_zero_rows_in_every_method(method, selection, axes):
    keys = {"method": method, "selection": selection, "neuron_axes": axes}
    assert_empty_calls_change_nothing(dataclasses.replace(CONFIG, **keys))


@pytest.mark.parametrize("method", ["none", "regularize", "deactivate", "silence"])
def test_zero_rows_where_the_gradient_is_injected(method):
    model = network()
    handle = l2e.attach(model, "1", dataclasses.replace(CONFIG, method=method), inject=True)
    for x in batches(5):
        model(x).sum().backward()
        handle.step()
    model.zero_grad()
    model(x[:0]).sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.count_nonzero(parameter.grad) == 0, name


@pytest.mark.parametrize("method", ["none", "regularize", "deactivate"])
def test_zero_rows_in_triton_kernels(method):
    pytest.importorskip("triton")
    config = dataclasses.replace(CONFIG, method=method, kernels="triton")
    chosen = backends.choose(config, torch.device("cpu"), torch.float32, neurons=8, biased=False)
    assert chosen.name == "triton"  # interpreted where there is no GPU
    assert_empty_calls_change_nothing(config)


def assert_empty_calls_change_nothing(config):
    states = []
    for empty_calls in (False, True):
        model = nn.Sequential(nn.Linear(4, 8)).train()
        torch.manual_seed(0)
        model[0].reset_parameters()
        handle = l2e.attach(model, "0", config)
        for x in batches(5, rows=12):
            x = x.view(4, 3, 4)
            if empty_calls:
                assert model(x[:0]).shape == (0, 3, 8)
            loss = model(x).square().mean() + handle.loss()
            if empty_calls:
                loss = loss + model(x[:0]).sum() + handle.loss()
            model.zero_grad()
            loss.backward()
            handle.step()
        assert torch.isfinite(model[0].weight.grad).all()
        states.append((handle.state_dict(), model[0].weight.grad))
    (state, grad), (with_empty, grad_with_empty) = states
    assert all(torch.equal(state[name], with_empty[name]) for name in state)
    torch.testing.assert_close(grad, grad_with_empty)
