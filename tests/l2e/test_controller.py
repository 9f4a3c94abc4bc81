"""One process against the plain float64 reference."""

import warnings

import numpy as np
import pytest
import torch

from l2e import Controller, L2EConfig, L2ELayer
from l2e.state import LayerState
from tests.l2e.reference import Reference, gelu, gelu_slope

NEURONS, TOKENS, STEPS = 32, 400, 12


def build(activation="gelu", neurons=NEURONS, inhibited_layers=1, **settings):
    config = L2EConfig(**settings)
    layer = L2ELayer(
        neurons, config, activation=activation, name="3", inhibited_layers=inhibited_layers
    )
    return layer, Controller([layer], config)


def batches(steps=STEPS, tokens=TOKENS, neurons=NEURONS, offset=0.0):
    rng = np.random.default_rng(7)
    scale = rng.uniform(0.5, 3, neurons)
    for _ in range(steps):
        yield (offset + scale * rng.standard_t(4, (tokens, neurons))).astype(np.float32)


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("scale_invariant", [False, True])
def test_equals_the_float64_reference(micro_batches, scale_invariant):
    settings = {"weight": 0.5, "scale_invariant": scale_invariant}
    layer, controller = build(late_start_step=4, forget_step=5, inhibited_layers=2, **settings)
    reference = Reference(late_start=4, forget=5, inhibited_layers=2, **settings)
    controller.gradient_scale = 1 / micro_batches
    for pre in batches():
        z = gelu(pre.astype(np.float64))
        x = torch.tensor(pre, requires_grad=True)
        weights = torch.linspace(-1, 1, NEURONS)
        for part in x.chunk(micro_batches):
            out = layer(part)
            (out * weights).sum().backward()
        slope = reference.loss_slope(z) + weights.double().numpy()
        expected = slope * gelu_slope(pre.astype(np.float64))
        loss, share = reference.loss(z), reference.selected(z).mean()
        reference.step(z)
        controller.step()
        np.testing.assert_allclose(x.grad.numpy(), expected, rtol=1e-4, atol=1e-6)
        metrics = controller.metrics()["3"]
        assert metrics["selected_fraction"] == pytest.approx(share, rel=1e-6)
        assert float(controller.ms_loss()) == pytest.approx(loss, rel=1e-5, abs=1e-9)
        if reference.tau:
            assert metrics["tau"] == pytest.approx(reference.tau, rel=1e-5)
        state = controller.state_dict()
        np.testing.assert_allclose(state["3.mean"], reference.mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state["3.var"], reference.var, rtol=1e-5)
        assert float(state["3.samples"]) == reference.m
    assert reference.updates == STEPS - 4
    assert 0.005 < share < 0.1


FORMS = [{}, {"scale_invariant": True}, {"selection": "topk", "topk": 3}]


def arriving(step, entries):
    """A gradient that changes in size over four orders of magnitude within the steps below."""
    rng = np.random.default_rng(step)
    return (10 ** (-4 + step / 3) * rng.standard_normal(entries)).astype(np.float32)


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("form", FORMS, ids=["published", "scale invariant", "topk"])
def test_the_gradients_ratio_is_measured(form, micro_batches):
    """On measured steps, with a weight that stays what it is."""
    layer, controller = build(None, late_start_step=4, weight=0.02, inhibited_layers=2, **form)
    controller.gradient_scale = 1 / micro_batches
    measured = float("nan")
    for step, pre in enumerate(batches()):
        controller.measure = step % 3 == 2
        x = torch.tensor(pre, requires_grad=True)
        grad = torch.tensor(arriving(step, pre.shape))
        for part, of_part in zip(x.chunk(micro_batches), grad.chunk(micro_batches), strict=True):
            layer(part).backward(of_part)
        added = x.grad.numpy() - grad.numpy().astype(float)
        controller.step()
        metrics = controller.metrics()["3"]
        if controller.measure and step >= 4:
            measured = np.sqrt((added**2).mean() / (grad.numpy().astype(float) ** 2).mean())
        # What was added is got back as a difference here, which costs digits.
        assert metrics["gradient_ratio"] == pytest.approx(measured, rel=1e-4, nan_ok=True)
        assert metrics["weight"] == 0.02
    assert measured > 0


@pytest.mark.parametrize("scale", [1.0, 2.0**-14, 2.0**16])
@pytest.mark.parametrize("scale_invariant", [False, True])
def test_the_weight_that_a_ratio_sets_equals_the_reference(scale_invariant, scale):
    """Whatever scales the loss, and with a scale of its own in every step."""
    keys = {"scale_invariant": scale_invariant, "gradient_ratio": 0.1}
    layer, controller = build(late_start_step=4, forget_step=3, inhibited_layers=2, **keys)
    reference = Reference(late_start=4, forget=3, inhibited_layers=2, **keys)
    for step, pre in enumerate(batches()):
        z, grad = gelu(pre.astype(np.float64)), arriving(step, pre.shape) / TOKENS
        of_step = scale * 4 ** (step % 2)
        controller.gradient_scale = of_step / 4
        x = torch.tensor(pre, requires_grad=True)
        for part, of_part in zip(x.chunk(4), torch.tensor(grad).chunk(4), strict=True):
            layer(part).backward(of_step * of_part)
        expected = (grad + reference.loss_slope(z)) * gelu_slope(pre.astype(np.float64))
        error = x.grad.numpy() / of_step - expected
        assert np.linalg.norm(error) < 1e-5 * np.linalg.norm(expected)
        weight, loss = reference.weight, reference.loss(z)
        if reference.tau is not None:
            reference.compare(z, grad.astype(np.float64))
        reference.step(z)
        controller.step()
        metrics = controller.metrics()["3"]
        assert metrics["weight"] == pytest.approx(weight, rel=1e-5)
        assert float(controller.ms_loss()) == pytest.approx(loss, rel=1e-5)
        state = controller.state_dict()
        for name in ("lm_gradient", "ms_gradient"):
            wanted = getattr(reference, name) * TOKENS
            assert float(state[f"3.{name}"]) == pytest.approx(wanted, rel=1e-5)
    assert reference.compared == STEPS - 4
    assert metrics["gradient_ratio"] < 0.1  # the gradient that arrives grows, its mean lags


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_gradient_that_is_zero_or_not_finite_leaves_the_weight(bad):
    layer, controller = build(late_start_step=3, gradient_ratio=0.1)

    def step(number, factor):
        x = torch.tensor(pre[number], requires_grad=True)
        layer(x).backward(factor * torch.tensor(arriving(number, pre[number].shape)))
        controller.step()
        return {k: v for k, v in controller.state_dict().items() if "gradient" in k}

    pre = list(batches())
    before = [step(number, 1.0) for number in range(6)][-1]
    weight = float(layer.state.weight)
    after = step(6, bad)
    assert after == before
    assert float(layer.state.weight) == weight != 0.0003
    assert step(7, 1.0) != before


def test_a_weight_that_no_gradient_could_set_is_told_once():
    layer, controller = build(late_start_step=3, gradient_ratio=0.1)
    for pre in batches(steps=13):
        x = torch.tensor(pre, requires_grad=True)
        layer(x).backward(torch.zeros(pre.shape))
        controller.step()
    with pytest.warns(UserWarning, match=r"gradient_ratio = 0.1 could not set the weight in 10"):
        controller.metrics()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert controller.metrics()["3"]["weight"] == pytest.approx(0.0003)


def test_a_state_saved_without_a_ratio_goes_on_with_one():
    """Its first estimate is its first step's; one saved with a ratio goes on to the bit."""
    pre = list(batches())

    def train(layer, controller, steps):
        for step in steps:
            x = torch.tensor(pre[step], requires_grad=True)
            layer(x).backward(torch.tensor(arriving(step, pre[step].shape)))
            controller.step()
        return controller.state_dict()

    kept = train(*build(late_start_step=3, gradient_ratio=0.1), range(8))
    layer, controller = build(late_start_step=3, gradient_ratio=0.1)
    half = train(layer, controller, range(6))
    again = build(late_start_step=3, gradient_ratio=0.1)
    again[1].load_state_dict(half)
    assert again[0].state.weight == layer.state.weight
    resumed = train(*again, range(6, 8))
    assert all(torch.equal(kept[name], resumed[name]) for name in kept)

    without = {k: v for k, v in half.items() if k.partition(".")[2] not in LayerState.RATIO}
    older = build(late_start_step=3, gradient_ratio=0.1)
    older[1].load_state_dict(without)
    assert float(older[0].state.weight) == pytest.approx(0.0003)
    state = train(*older, range(6, 7))
    assert state["3.ratio_updates"] == 1
    assert older[0].state.weight == 0.1 * state["3.lm_gradient"] / state["3.ms_gradient"]


def test_logged_metrics_are_those_of_the_batch():
    layer, controller = build(late_start_step=100)
    reference = Reference(late_start=100, forget=100)
    controller.measure = True
    for pre in batches(steps=3):
        z = gelu(pre.astype(np.float64))
        if reference.steps:
            phi = reference.phi(z)
            deviation = z - reference.mean
            kurtosis = (deviation**4).mean(0) / (deviation**2).mean(0) ** 2
        for part in torch.tensor(pre).chunk(3):
            residual = layer(part)
            layer.observe_output(0.5 * residual, residual)
        reference.step(z)
        controller.step()
    metrics = controller.metrics()["3"]
    assert metrics["mean_ms"] == pytest.approx(phi.mean(), rel=1e-5)
    assert metrics["max_ms"] == pytest.approx(phi.max(), rel=1e-5)
    below_median = np.sort(kurtosis)[(NEURONS - 1) // 2]
    assert metrics["kurtosis"] == pytest.approx(below_median, rel=1e-4)
    assert metrics["mlp_to_residual"] == pytest.approx(0.5)
    assert metrics["std"] == pytest.approx(np.sqrt(reference.var.mean()), rel=1e-5)
    assert int(controller.histograms()["3"].sum()) == phi.size


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_merging_equals_numpy_over_the_concatenation(offset, micro_batches):
    """MEmeL's Lemma 3.2, without forgetting, in float32 even far from zero."""
    layer, controller = build(activation=None, forget_step=1000, late_start_step=1000)
    seen = []
    for z in batches(steps=20, offset=offset):
        seen.append(z.astype(np.float64))
        for part in torch.tensor(z).chunk(micro_batches):
            layer(part)
        controller.step()
    everything = np.concatenate(seen)
    state = controller.state_dict()
    np.testing.assert_allclose(state["3.mean"], everything.mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(state["3.var"], everything.var(0, ddof=1), rtol=1e-6)


def test_recomputed_activations_are_counted_once():
    counted = []
    for reentrant in (None, False, True):
        layer, controller = build(late_start_step=2, weight=1.0)
        gradients = []
        for pre in batches(steps=4):
            x = torch.tensor(pre, requires_grad=True)
            if reentrant is None:
                out = layer(x)
            else:
                out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)
            out.sum().backward()
            controller.step()
            gradients.append(x.grad)
        counted.append((controller.state_dict(), gradients))
    plain, *checkpointed = counted
    for state, gradients in checkpointed:
        assert all(torch.equal(state[name], plain[0][name]) for name in state)
        assert all(torch.equal(a, b) for a, b in zip(gradients, plain[1], strict=True))


def test_eval_is_the_plain_activation_bit_for_bit():
    x = torch.randn(5, 7, NEURONS)
    for method in ("none", "regularize", "deactivate", "silence"):
        layer, controller = build(method=method, late_start_step=2)
        before = controller.state_dict()
        assert torch.equal(layer.eval()(x), torch.nn.functional.gelu(x))
        assert not list(layer.parameters())
        assert not list(layer.buffers())
        controller.step()
        assert torch.equal(controller.state_dict()["3.mean"], before["3.mean"])


def test_resume_is_bit_exact():
    data = [torch.tensor(pre) for pre in batches()]
    layer, controller = build(late_start_step=3, forget_step=4)
    for step, pre in enumerate(data):
        if step == 6:
            saved = controller.state_dict()
        layer(pre)
        controller.step()
    other, resumed = build(late_start_step=3, forget_step=4)
    resumed.load_state_dict(saved)
    for pre in data[6:]:
        other(pre)
        resumed.step()
    expected, found = controller.state_dict(), resumed.state_dict()
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name


def test_state_of_another_model_is_refused():
    _, controller = build()
    _, other = build(neurons=NEURONS * 2)
    with pytest.raises(ValueError, match=r"layer 3: mean has shape \[64\].*needs \[32\]"):
        controller.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="no entries"):
        controller.load_state_dict({"step": torch.tensor(1)})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("bad_step", [0, 3])
def test_a_bad_activation_is_named_and_leaves_statistics_untouched(value, bad_step):
    layer, controller = build(late_start_step=2)
    for step, pre in enumerate(batches(steps=bad_step + 1)):
        before = controller.state_dict()
        x = torch.tensor(pre)
        if step == bad_step:
            x[3, 5] = value
        layer(x)
        controller.step()
    after = controller.state_dict()
    for name in ("3.mean", "3.var", "3.samples", "3.tau"):
        assert torch.equal(before[name], after[name]), name
    with pytest.raises(ValueError, match=f"layer 3: NaN or Inf.* step {bad_step}"):
        controller.metrics()
