"""What `attach` is given, and states that are loaded."""

import pytest
import torch
from torch import nn

import l2e
from l2e import L2EConfig
from tests.l2e.loops.twin import (
    CONFIG,
    batches,
    network,
    observed,
)


def test_arguments_that_do_not_fit_are_refused():
    shared = nn.GELU()
    twice = nn.ModuleDict(
        {"a": nn.Sequential(nn.Linear(4, 8), shared), "b": nn.Sequential(nn.Linear(8, 8), shared)}
    )
    for model, pattern, config, message in (
        (network(), "", CONFIG, "pattern = ''"),
        (network(), ["0", "1"], CONFIG, r"pattern = \['0', '1'\]"),
        (network(), "1", {"weight": 1.0}, r"config is dict.*L2EConfig\(\*\*keys\)"),
        (twice, "a.1", CONFIG, "one module serves as a.1, b.1"),
    ):
        with pytest.raises(ValueError, match=message):
            l2e.attach(model, pattern, config)
    for key in ("weight", "eps", "delta"):
        with pytest.raises(ValueError, match=key):
            L2EConfig(**{key: float("inf")})


def test_an_alias_of_a_module_is_no_second_place():
    model = nn.ModuleDict({"inner": network()})
    model["alias"] = model["inner"]
    handle = l2e.attach(model, "*.1", CONFIG)
    assert handle.names == ["inner.1"]
    handle.detach()
    assert l2e.attach(model, "alias.1", CONFIG).names == ["alias.1"]


@pytest.mark.parametrize(
    ("module", "shape", "neuron_dim", "message"),
    [
        (nn.Conv2d(3, 6, 3), (2, 3, 9, 9), -1, "module 0 has 6 neurons.*neuron_dim = 1"),
        (nn.Linear(4, 8), (2, 5, 4), 1, "module 0 has 8 neurons.*neuron_dim = 2"),
        (nn.Identity(), (2, 5), 2, r"shape \[2, 5\], which has no dimension neuron_dim = 2"),
        # Which dimension it is cannot be seen, and is asked for.
        (nn.Conv2d(3, 6, 3), (2, 3, 9, 9), None, r"module 0: .*\[2, 6, 7, 7\].*neuron_dim = 1"),
        (nn.Conv1d(3, 6, 3), (2, 3, 8), None, r"module 0: .*\[2, 6, 6\].*neuron_dim = 1"),
        (nn.Conv1d(3, 6, 3), (3, 8), None, r"module 0: .*\[6, 6\].*neuron_dim"),
        (nn.BatchNorm2d(3), (2, 3, 3, 3), None, r"module 0: .*\[2, 3, 3, 3\].*neuron_dim = 1"),
        (nn.GELU(), (2, 6, 7, 7), None, "tell attach which dimension.*-1 for the last"),
        (nn.Upsample(scale_factor=2), (2, 3, 4, 5, 6), None, "tell attach which dimension"),
    ],
)
def test_a_wrong_neuron_dim_is_refused(module, shape, neuron_dim, message):
    model = nn.Sequential(module).train()
    l2e.attach(model, "0", CONFIG, neuron_dim=neuron_dim)
    with pytest.raises(ValueError, match=message):
        model(torch.randn(shape))


@pytest.mark.parametrize("moved", [False, True])
def test_an_activation_behind_a_convolution_is_asked_for_its_channels(moved):
    """[batch, channels, length] looks like [batch, sequence, neurons]."""

    class Convolution(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)
            self.acts = nn.Sequential(nn.ReLU(), nn.Dropout(0.1), nn.GELU())

        def forward(self, x):
            x = 1 + self.norm(self.conv(x))
            x = x + x.mean(2, keepdim=True)
            return self.acts(x.transpose(1, 2) if moved else x)

    model = Convolution().train()
    handle = l2e.attach(model, "acts.2", CONFIG)
    if moved:
        model(torch.randn(2, 3, 10))
        handle.step()
        assert handle.state_dict()["acts.2.mean"].shape == (6,)
    else:
        with pytest.raises(ValueError, match=r"\[2, 6, 8\]: tell attach which dimension"):
            model(torch.randn(2, 3, 10))


def test_a_module_of_ones_own_may_say_other_widths():
    """transformers' patch embeddings have num_channels, those of the image."""

    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_channels = 3
            self.projection = nn.Conv2d(3, 16, 4, 4)

        def forward(self, images):
            return self.projection(images).flatten(2).transpose(1, 2)

    model = nn.Sequential(Patches()).train()
    images = torch.randn(2, 3, 8, 8)
    asked = l2e.attach(model, "0", CONFIG)
    with pytest.raises(ValueError, match=r"\[2, 4, 16\].*-1 for the last"):
        model(images)
    asked.detach()
    handle = l2e.attach(model, "0", CONFIG, neuron_dim=-1)
    model(images)
    handle.step()
    assert handle.state_dict()["0.mean"].shape == (16,)


def test_widths_that_change_are_refused():
    model = nn.Sequential(nn.Identity()).train()
    l2e.attach(model, "0", CONFIG)
    model(torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"layer 0: .*6 units after 5.*neuron_dim"):
        model(torch.randn(3, 6))


def test_a_state_fits_whatever_prefix_wraps_the_model():
    model, handle, _ = observed()
    state = handle.state_dict()
    handle.detach()
    wrapped = nn.ModuleDict({"module": nn.ModuleDict({"net": model})})
    outer = l2e.attach(wrapped, "*.1", CONFIG)
    outer.load_state_dict(state)
    saved = outer.state_dict()
    outer.detach()
    back = l2e.attach(model, "1", CONFIG)
    back.load_state_dict(saved)
    for name, value in back.state_dict().items():
        assert torch.equal(value, state[name])
    with pytest.raises(ValueError, match="layers 1: this handle's are 0"):
        l2e.attach(model, "0", CONFIG).load_state_dict(state)
    with pytest.raises(ValueError, match=r"layer 1: no entries mean, .*distributed checkpoint"):
        back.load_state_dict({"step": state["step"], "1.samples": state["1.samples"]})


def test_a_state_of_two_parts_is_not_guessed_from():
    both = nn.ModuleDict({"encoder": network(0), "decoder": network(1)})
    handle = l2e.attach(both, "*.1", CONFIG)
    for part in both.values():
        part(batches(1)[0])
    handle.step()
    state = handle.state_dict()
    alone = l2e.attach(network(), "1", CONFIG)
    with pytest.raises(ValueError, match=r"could be those under decoder\. or encoder\."):
        alone.load_state_dict(state)
    del state["decoder.1.samples"]
    alone.load_state_dict({n: v for n, v in state.items() if not n.startswith("decoder")})
    assert torch.equal(alone.state_dict()["1.mean"], state["encoder.1.mean"])
