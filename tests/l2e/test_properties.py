"""What holds for any shape, dtype and offset."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from l2e import Controller, L2EConfig, L2ELayer

shapes = st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 17))
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
methods = st.sampled_from(["none", "regularize", "deactivate", "silence"])


def run(batches, activation=None, **configuration):
    config = L2EConfig(**{"late_start_step": 2} | configuration)
    neurons = batches[0].shape[-1]
    layer = L2ELayer(neurons, config, activation=activation, name="1", inhibited_layers=1)
    controller = Controller([layer], config)
    controller.measure = True
    outs = []
    for x in batches:
        x = x.detach().requires_grad_()
        out = layer(x)
        out.backward(torch.ones_like(out))
        controller.step()
        outs.append((out, x.grad))
    return outs, controller


def random(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(deadline=None, max_examples=60)
@given(
    shape=shapes,
    dtype=dtypes,
    method=methods,
    selection=st.sampled_from(["threshold", "topk"]),
    site=st.sampled_from(["pre", "post"]),
    axes=st.sampled_from(["unit", "position"]),
    activation=st.sampled_from([None, "gelu", "gelu_tanh"]),
    seed=st.integers(0, 999),
)
def test_shape_dtype_and_finiteness(shape, dtype, method, selection, site, axes, activation, seed):
    batches = [random(shape, seed + step, dtype) for step in range(5)]
    outs, controller = run(
        batches, activation, method=method, selection=selection, site=site, neuron_axes=axes
    )
    for out, grad in outs:
        assert out.shape == shape
        assert out.dtype == grad.dtype == dtype
        assert torch.isfinite(out).all()
        assert torch.isfinite(grad).all()
    assert all(v.dtype == torch.float32 for k, v in controller.state_dict().items() if k != "step")
    controller.metrics()


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 40),
    neurons=st.integers(1, 20),
    steps=st.integers(1, 6),
    pieces=st.integers(1, 4),
    offset=st.floats(-1e4, 1e4),
    seed=st.integers(0, 999),
)
def test_merged_statistics_are_those_of_all_samples(tokens, neurons, steps, pieces, offset, seed):
    config = L2EConfig(forget_step=100, late_start_step=100)
    layer = L2ELayer(neurons, config, activation=None, name="1", inhibited_layers=1)
    controller = Controller([layer], config)
    seen = []
    for step in range(steps):
        z = random((tokens, neurons), seed + step) + offset
        seen.append(z.double())
        for part in z.chunk(pieces):
            layer(part)
        controller.step()
    everything = torch.cat(seen).numpy()
    state = controller.state_dict()
    np.testing.assert_allclose(state["1.mean"], everything.mean(0), rtol=1e-6, atol=1e-5)
    expected = everything.var(0, ddof=1) if len(everything) > 1 else np.zeros(neurons)
    np.testing.assert_allclose(state["1.var"], expected, rtol=1e-4, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(constant=st.floats(-1e3, 1e3, width=32), all_constant=st.booleans(), topk=st.booleans())
def test_neurons_without_variance_are_never_selected(constant, all_constant, topk):
    batches = [random((20, 6), seed) for seed in range(6)]
    for x in batches:
        x[:, (slice(None) if all_constant else slice(2))] = constant
    selection = "topk" if topk else "threshold"
    outs, controller = run(batches, selection=selection, weight=1.0, scale_invariant=not topk)
    for _, grad in outs:
        assert (grad[:, :2] == 1).all()
    metrics = controller.metrics()["1"]
    assert np.isfinite(metrics["max_ms"])


@settings(deadline=None, max_examples=30)
@given(pieces=st.integers(1, 5), seed=st.integers(0, 99), method=methods)
def test_cutting_into_micro_batches_changes_nothing(pieces, seed, method):
    batches = [random((60, 8), seed + step) for step in range(6)]
    config = L2EConfig(method=method, late_start_step=2, weight=1.0)
    found = []
    for cut in (1, pieces):
        layer = L2ELayer(8, config, name="1", inhibited_layers=1)
        controller = Controller([layer], config)
        for x in batches:
            controller.gradient_scale = 1 / cut
            x = x.detach().requires_grad_()
            for part in x.chunk(cut):
                layer(part).backward(torch.ones_like(part))
            controller.step()
        found.append((x.grad, controller.state_dict(), controller.ms_loss()))
    (grad, state, loss), (cut_grad, cut_state, cut_loss) = found
    torch.testing.assert_close(cut_grad, grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(cut_loss, loss, rtol=1e-5, atol=1e-8)
    for name, value in state.items():
        torch.testing.assert_close(cut_state[name], value, rtol=1e-4, atol=1e-6, equal_nan=True)
