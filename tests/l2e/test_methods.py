"""What each method does to selected activations, by hand-written exact answers."""

import numpy as np
import pytest
import torch

from l2e import Controller, L2EConfig, L2ELayer, selection


def build(neurons, activation=None, **settings):
    config = L2EConfig(**{"late_start_step": 2} | settings)
    layer = L2ELayer(neurons, config, activation=activation, name="1", inhibited_layers=1)
    return layer, Controller([layer], config)


def observe(layer, controller, batches):
    for batch in batches:
        layer(batch)
        controller.step()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("delta", "expected"), [(-1, 7.6), (0, 7.0), (1, 6.4), (5, 4.0)])
def test_one_gradient_step_through_the_deactivated_value(delta, expected):
    """MEmeL's Lemma 3.3: z = 7, mean 1, lr 0.1, loss z'^2 / 2 - 7 z', so that g = z' - 7 = -6.

    z moves by the factor (1 - delta * lr) towards or away from the mean 1.
    """
    layer, controller = build(1, method="deactivate", delta=float(delta))
    controller.load_state_dict(known_state(mean=1.0, var=1.0, tau=4.0))
    z = torch.tensor([[7.0]], requires_grad=True)
    out = layer(z)
    assert out.item() == 1.0
    (out * (z.detach() - 1) * -1).sum().backward()
    assert float(z.detach() - 0.1 * z.grad) == pytest.approx(expected, abs=1e-5)


def known_state(mean, var, tau, neurons=1):
    filled = {"mean": mean, "mean_low": 0.0, "var": var, "share": 0.0}
    single = {
        "tau": tau,
        "samples": 100.0,
        "updates": 0.0,
        "mean_var": var,
        "std_at_start": 1.0,
    }
    tensors = {f"1.{name}": torch.full((neurons,), value) for name, value in filled.items()}
    tensors |= {f"1.{name}": torch.tensor(value) for name, value in single.items()}
    return tensors | {"step": torch.tensor(10)}


def test_only_selected_activations_are_deactivated():
    layer, controller = build(3, method="deactivate", delta=2.0)
    controller.load_state_dict(known_state(mean=0.5, var=1.0, tau=4.0, neurons=3))
    z = torch.tensor([[0.0, 9.0, -3.0], [2.5, 0.5, -1.6]], requires_grad=True)
    out = layer(z)
    # (z - 0.5)^2 >= 4 * 1.01: at 9, -3 and -1.6.
    assert out.tolist() == [[0.0, 0.5, 0.5], [2.5, 0.5, 0.5]]
    out.backward(torch.ones_like(out))
    assert z.grad.tolist() == [[1, -2, -2], [1, 1, -2]]


def test_chance_selects_its_share_in_every_sequence_alike():
    """2 % of (position, neuron) pairs, in every step others, on every shard alike."""
    config = L2EConfig(selection="random", late_start_step=2)
    layer, controller = build(500, selection="random")
    observe(layer, controller, [normal(3, 40, 500, seed=s) for s in range(3)])
    masks = [layer.operate(normal(3, 40, 500, seed=9))[2] for _ in "12"]
    assert masks[0].float().mean() == pytest.approx(0.02, abs=0.003)
    assert torch.equal(masks[0], masks[1])  # a recomputation selects the same
    assert torch.equal(masks[0][0], masks[0][2])
    second = L2ELayer(
        250, config, activation=None, name="1", inhibited_layers=1, total_neurons=500
    ).state
    second.sharding = type("Second", (), {"tensor_rank": 1})()
    second.phase.step = 3
    assert torch.equal(selection.by_chance(second, 40, torch.device("cpu")), masks[0][0, :, 250:])
    controller.step()
    assert not torch.equal(layer.operate(normal(3, 40, 500))[2], masks[0])


def test_loss_of_chance_selections_is_bounded_and_has_the_gradient_it_says():
    """Entries at the mean itself: log continued by a quadratic, by central differences."""
    layer, controller = build(60, selection="random", weight=1000.0, inhibit_fraction=0.3)
    observe(layer, controller, [normal(4, 30, 60, seed=s).double().float() for s in range(4)])
    z = normal(4, 30, 60, seed=8).requires_grad_()
    layer(z).sum().backward()
    pull = (z.grad - 1) / layer.state.loss_factor(120)
    chosen = layer.operate(z.detach())[2]
    assert not pull[~chosen].any()
    least, mean = layer.state.threshold.double(), layer.state.statistics.mean.double()

    def value(z):
        square = (z - mean).square()
        return torch.where(square < least, least.log() + square / least - 1, square.log())

    exact, h = z.detach().double(), 1e-6
    slope = (value(exact + h) - value(exact - h)) / (2 * h)
    assert torch.allclose(pull[chosen].double(), slope[chosen], rtol=1e-4, atol=1e-4)
    assert pull.abs().max() <= 2 / least.sqrt().min() * 1.001
    loss = layer.operate(z.detach())[1]
    assert float(loss) == pytest.approx(float(value(exact)[chosen].sum()), rel=1e-5)


def test_silence_switches_the_layer_off_from_the_first_step():
    layer, controller = build(8, activation="gelu", method="silence")
    x = normal(5, 8).requires_grad_()
    out = layer(x)
    out.sum().backward()
    assert not out.any()
    assert not x.grad.any()
    controller.step()
    assert controller.metrics()["1"]["std"] > 0


def test_none_observes_and_changes_nothing():
    data = [normal(50, 16, seed=s) for s in range(6)]
    layer, controller = build(16, activation="gelu", method="none", weight=10.0)
    other, _ = build(16, activation="gelu", method="regularize", weight=10.0)
    for x in data:
        x.requires_grad_()
        out = layer(x)
        assert torch.equal(out, torch.nn.functional.gelu(x))
        out.square().sum().backward()
        plain = x.detach().clone().requires_grad_()
        torch.nn.functional.gelu(plain).square().sum().backward()
        assert torch.equal(x.grad, plain.grad)
        controller.step()
    assert controller.metrics()["1"]["selected_fraction"] > 0
    assert float(controller.ms_loss()) == 0
    assert other.config.weight == 10.0


def test_regularize_keeps_the_value_and_weight_zero_keeps_the_gradient():
    for weight in (0.0, 1.0):
        layer, controller = build(16, activation="gelu", weight=weight)
        observe(layer, controller, [normal(50, 16, seed=s) for s in range(3)])
        x = (2 * normal(50, 16, seed=9)).requires_grad_()
        out = layer(x)
        assert torch.equal(out, torch.nn.functional.gelu(x))
        out.sum().backward()
        plain = x.detach().clone().requires_grad_()
        torch.nn.functional.gelu(plain).sum().backward()
        assert torch.equal(x.grad, plain.grad) == (weight == 0)


def test_the_activations_before_the_non_linearity():
    data = [3 + normal(50, 16, seed=s) for s in range(4)]
    layer, controller = build(16, activation="gelu", site="pre", method="deactivate", delta=0.0)
    plain, plain_controller = build(16, method="deactivate", delta=0.0)
    for x in data:
        out, inhibited = layer(x), plain(x)
        assert torch.equal(out, torch.nn.functional.gelu(inhibited))
        controller.step()
        plain_controller.step()
    assert not torch.equal(inhibited, x)
    assert float(controller.state_dict()["1.mean"].mean()) == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("k", [1, 3])
def test_topk_selects_the_largest_scales_of_each_token(k):
    layer, controller = build(16, method="deactivate", selection="topk", topk=k, delta=0.0)
    scale = torch.linspace(0.5, 4, 16)
    observe(layer, controller, [scale * normal(50, 16, seed=s) for s in range(3)])
    state = {name: value.double() for name, value in controller.state_dict().items()}
    x = scale * normal(20, 16, seed=9)
    out = layer(x)
    phi = (x - state["1.mean"]) ** 2 / (state["1.var"] + 0.01 * state["1.var"].mean())
    largest = torch.zeros(20, 16, dtype=torch.bool)
    largest.scatter_(1, phi.argsort(dim=1, descending=True)[:, :k], True)
    assert torch.equal(out != x, largest)
    assert torch.allclose(out[largest], state["1.mean"].float().expand(20, 16)[largest])


def test_topk_loss_divides_by_the_selected_entries():
    layer, controller = build(16, selection="topk", topk=2, weight=0.7)
    observe(layer, controller, [normal(50, 16, seed=s) for s in range(3)])
    mean = controller.state_dict()["1.mean"]
    x = normal(20, 16, seed=9).requires_grad_()
    layer(x).sum().backward()
    controller.step()
    pushed = x.grad != 1
    assert (pushed.sum(1) == 2).all()
    deviation = (x.detach() - mean)[pushed]
    assert torch.allclose(x.grad[pushed] - 1, 0.7 / (2 * 20) * 2 / deviation, rtol=1e-3, atol=1e-5)
    expected = 0.7 * deviation.double().square().log().mean()
    assert float(controller.ms_loss()) == pytest.approx(float(expected), rel=1e-5)


def test_position_axes_keep_statistics_of_every_position():
    layer, controller = build(8, neuron_axes="position", method="deactivate", selection="topk")
    data = normal(4, 30, 6, 8) * torch.arange(1, 7)[:, None]
    for batch in data:
        layer(batch)
        controller.step()
    state = controller.state_dict()
    seen = data.double().reshape(120, 6, 8)
    assert state["1.var"].shape == (6, 8)
    np.testing.assert_allclose(state["1.mean"], seen.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state["1.var"], seen.var(0), rtol=1e-5)
    # One selected entry in each sequence, not in each token.
    x = normal(5, 6, 8, seed=3)
    assert ((layer(x) != x).flatten(1).sum(1) == 1).all()
    with pytest.raises(ValueError, match="found 7 positions after 6"):
        layer(normal(5, 7, 8))


def test_a_sequence_first_layer_computes_the_same():
    results = []
    for sequence_first in (False, True):
        config = L2EConfig(neuron_axes="position", late_start_step=2, weight=1.0)
        layer = L2ELayer(8, config, name="1", inhibited_layers=1, sequence_first=sequence_first)
        controller = Controller([layer], config)
        for seed in range(5):
            x = normal(30, 6, 8, seed=seed).requires_grad_()
            layer(x.transpose(0, 1) if sequence_first else x).sum().backward()
            controller.step()
        results.append((x.grad, controller.state_dict()))
    (grad, state), (other_grad, other_state) = results
    assert torch.equal(grad, other_grad)
    assert all(torch.equal(state[name], other_state[name]) for name in state)


def test_position_state_survives_a_checkpoint():
    made = [build(8, neuron_axes="position") for _ in range(2)]
    (layer, controller), (_, restored) = made
    observe(layer, controller, [normal(30, 6, 8, seed=s) for s in range(4)])
    restored.load_state_dict(controller.state_dict())
    for name, value in controller.state_dict().items():
        assert torch.equal(value, restored.state_dict()[name])


@pytest.mark.parametrize(("axes", "samples"), [("unit", 24), ("position", 4)])
def test_memel_code_scores_after_the_update_and_counts_the_first_batch_twice(axes, samples):
    """Written out: mean with one batch too many, score by the merged statistics, one a sequence."""
    settings = {"method": "deactivate", "selection": "topk", "delta": 0.0, "late_start_step": 0}
    settings["neuron_axes"] = axes
    layer, controller = build(8, memel_code_compat=True, forget_step=10, **settings)
    mean, var, m = None, None, 0
    for seed in range(5):
        x = 2 + normal(4, 6, 8, seed=seed)
        z = x.double().reshape(samples, -1)
        b, u, v = samples, z.mean(0), z.var(0, correction=0)
        if m == 0:
            mean, var, m = u, v * b / (b - 1), b
        else:
            var = m * b * (mean - u) ** 2 / ((m + b - 1) * (m + b)) + (b * v + (m - 1) * var) / (
                m + b - 1
            )
            mean = ((m + b) * mean + b * u) / (m + 2 * b)
            m += b
        phi = (z - mean) ** 2 / (var + 0.01 * var.mean())
        picked = phi.reshape(4, 48).argmax(1)
        changed = (layer(x) != x).reshape(4, 48)
        assert (changed.sum(1) == 1).all()
        assert torch.equal(changed.float().argmax(1), picked)
        controller.step()
    np.testing.assert_allclose(controller.state_dict()["1.mean"].flatten(), mean, rtol=1e-5)


@pytest.mark.parametrize("distribution", ["normal", "laplace", "student"])
def test_scale_invariance_balances_the_pull(distribution):
    """Scaling a neuron uniformly: sum of z * dL/dz over its entries is zero in expectation."""
    draw = {
        "normal": lambda rng: rng.standard_normal((4000, 8)),
        "laplace": lambda rng: rng.laplace(size=(4000, 8)),
        "student": lambda rng: rng.standard_t(5, (4000, 8)),
    }[distribution]
    net = {}
    for scale_invariant in (False, True):
        rng = np.random.default_rng(1)
        layer, controller = build(8, weight=1.0, scale_invariant=scale_invariant)
        pulls = []
        for step in range(80):
            z = torch.tensor(draw(rng), dtype=torch.float32, requires_grad=True)
            layer(z).backward(torch.zeros_like(z))
            if step > 10:
                deviation = z.detach() - controller.state_dict()["1.mean"]
                pulls.append((deviation * z.grad).sum(0).double())
            controller.step()
        pulls = torch.stack(pulls).mean(1)
        net[scale_invariant] = float(pulls.mean()), float(pulls.std()) / len(pulls) ** 0.5
    # The plain loss pulls every selected entry with weight 2 / (k N b), so 2 / N a neuron.
    assert net[False][0] == pytest.approx(2 / 8, rel=0.05)
    mean, error = net[True]
    assert abs(mean) < 4 * error + 0.01 * 2 / 8


@pytest.mark.parametrize("strength", ["weight", "gradient_ratio"])
def test_collapse_is_warned_of_once(strength):
    layer, controller = build(16, forget_step=1, **{strength: 0.1})
    observe(layer, controller, [normal(50, 16, seed=s) for s in range(3)])
    controller.metrics()
    observe(layer, controller, [normal(50, 16, seed=s) / 200 for s in range(12)])
    with pytest.warns(UserWarning, match=rf"layer 1: .* fell to .* lower {strength},"):
        controller.metrics()
