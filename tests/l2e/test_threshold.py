"""The moving threshold holds the share it is told to, whatever the activations' distribution."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from l2e import Controller, L2EConfig, L2ELayer, sharding, threshold

DRAWS = {
    "gaussian": lambda rng, shape: rng.standard_normal(shape),
    "laplace": lambda rng, shape: rng.laplace(size=shape),
    "student": lambda rng, shape: rng.standard_t(3, shape),
}
START, WINDOW = 20, 100


def selected_shares(draw, jump=1.0, jump_at=0, steps=520, forget_step=100, drift=1.0):
    """The selected share of every step from the first inhibited one on.

    From `jump_at` steps after that one the scale is `jump` times as large, and `drift` times as
    large again with every further step.
    """
    config = L2EConfig(late_start_step=START, forget_step=forget_step)
    layer = L2ELayer(64, config, activation=None, name="1", inhibited_layers=1)
    controller = Controller([layer], config)
    rng, shares = np.random.default_rng(5), []
    for step in range(steps):
        z = torch.tensor(draw(rng, (256, 64)), dtype=torch.float32)
        since = step - START - jump_at
        layer(z * jump * drift**since if since >= 0 else z)
        controller.step()
        shares.append(controller.metrics()["1"]["selected_fraction"])
    return np.array(shares[START:])


def windows(shares):
    return np.convolve(shares, np.ones(WINDOW) / WINDOW, "valid")


@pytest.mark.parametrize("distribution", DRAWS)
def test_holds_two_percent_on_stationary_input(distribution):
    means = windows(selected_shares(DRAWS[distribution])[200:])
    assert means.min() > 0.018
    assert means.max() < 0.022


@pytest.mark.parametrize("forget_step", [10, 100])
@pytest.mark.parametrize("jump", [4.0, 0.25])
def test_recovers_within_200_steps_of_a_jump_of_scale(jump, forget_step):
    shares = selected_shares(DRAWS["gaussian"], jump, jump_at=200, forget_step=forget_step)
    assert abs(shares[200] / 0.02 - 1) > 0.5  # the jump is felt
    means = windows(shares[400:])
    assert means.min() > 0.018
    assert means.max() < 0.022


@pytest.mark.parametrize("drift_at", [0, 200])
@pytest.mark.parametrize("drift", [1.02, 0.98])
@pytest.mark.parametrize("distribution", DRAWS)
def test_holds_while_the_scale_drifts(distribution, drift, drift_at):
    """2 % a step either way: `update` alone, which lags by drift over eta, selects 6 % or 0."""
    shares = selected_shares(DRAWS[distribution], drift=drift, jump_at=drift_at)
    means = windows(shares[200:])
    assert means.min() > 0.018
    assert means.max() < 0.022


def test_an_older_state_goes_on():
    """Only its first step has nothing to hold its own mean MS against."""
    config = L2EConfig(late_start_step=2)
    layers = [L2ELayer(8, config, activation=None, name="1", inhibited_layers=1) for _ in "12"]
    old, new = (Controller([layer], config) for layer in layers)
    draws = [torch.randn(64, 8, generator=torch.manual_seed(n)) for n in range(8)]
    for z in draws[:4]:
        layers[0](z)
        old.step()
    state = old.state_dict()
    del state["1.mean_ms"], state["1.drift"]
    new.load_state_dict(state)
    for z in draws[4:]:
        for layer, controller in zip(layers, (old, new), strict=True):
            layer(z)
            controller.step()
    taus = [float(controller.metrics()["1"]["tau"]) for controller in (old, new)]
    assert taus[0] == pytest.approx(taus[1], rel=0.2)
    assert taus[0] != taus[1]


@pytest.mark.parametrize("fraction", [0.001, 0.02, 0.3])
def test_starts_at_the_quantile(fraction):
    scale = torch.from_numpy(np.random.default_rng(0).chisquare(1, 200_000))
    start = threshold.quantile(threshold.histogram(scale), fraction)
    # Half a bin of 1/32 octave either way, and what that many samples can tell.
    assert float(start) == pytest.approx(np.quantile(scale, 1 - fraction), rel=0.03)


def test_extremes_fall_into_the_outer_bins():
    counts = threshold.histogram(torch.tensor([0.0, 1e-30, 1e30, float("inf"), 1.0]))
    edges = threshold.bin_edges()
    assert len(edges) == len(counts) + 1
    assert counts[0] == 2
    assert counts[-1] == 2
    assert edges[int(counts[1:-1].argmax()) + 1] == 1.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.integers(1, 4096))
def test_counts_sum_exactly_through_float32_words(shares, ranks):
    counts = [int(share * (2**36 // ranks - 1)) for share in shares]
    words = sharding.to_words(torch.tensor(counts))
    total = sharding.from_words(sum_of(words, ranks))
    assert total.tolist() == [ranks * count for count in counts]


def sum_of(words, ranks):
    """An all-reduce's float32 sum, in one of its possible orders: by doubling."""
    total, power = torch.zeros_like(words), words
    while ranks:
        total = total + power if ranks % 2 else total
        ranks, power = ranks // 2, power + power
    return total
