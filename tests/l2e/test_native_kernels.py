"""The pass in C over activations on a CPU, against float64 NumPy, whatever their shape."""

import numpy as np
import pytest
import torch

from l2e import Controller, L2EConfig, L2ELayer, backends, kernels, native_kernels
from l2e.kernels import KernelArguments

# Narrow and wide, with a short last block of columns, and of rows; more rows than a call takes.
SHAPES = [(1, 1), (3, 5), (400, 77), (130, 512), (50, 1030), (9000, 130)]
# Relative and absolute errors of a gradient; 1 + tanh cancels in float32, also where bf16 goes in.
NEAR = {torch.float32: (1e-5, 2e-6), torch.bfloat16: (2**-8, 4e-6), torch.float64: (1e-7, 1e-12)}
pytestmark = pytest.mark.skipif(
    backends.choose(L2EConfig(), torch.device("cpu"), torch.float32).name != "native",
    reason="no C compiler that works",
)


def activations(rows, neurons, dtype):
    """Skewed, of different means."""
    generator = torch.Generator().manual_seed(rows)
    z = torch.randn(rows, neurons, generator=generator).exp() + torch.arange(neurons) % 5
    return z.to(dtype)


def expected(z, mean, selected):
    """Sums of deviations, squares and selections, and numbers and slopes of what is selected."""
    deviation = z.float().numpy().astype(np.float64) - mean.numpy()
    sums = np.stack([deviation.sum(0), np.square(deviation).sum(0), selected.sum(0)])
    return sums, np.flatnonzero(selected), 1 / deviation[selected], np.log(deviation**2)[selected]


def observe(z, arguments):
    sums = torch.zeros(3 * z.shape[1] + 1)
    entries, values, loss = native_kernels.observe(z, arguments, sums)
    assert float(sums[-1]) == pytest.approx(loss, rel=1e-6)
    order = entries.argsort()
    return sums[:-1].view(3, -1).numpy(), float(sums[-1]), entries[order], values[order]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_sums_and_selection(shape, dtype, masked):
    z = activations(*shape, dtype)
    mean, threshold = z.float().mean(0) + 0.25, torch.linspace(1, 30, shape[1])
    selected = ((z.float() - mean) ** 2 >= threshold).numpy()
    if masked:
        selected = np.random.default_rng(0).random(shape) < 0.03
        threshold = torch.from_numpy(selected)
    wanted, numbers, slopes, logs = expected(z, mean, selected)
    sums, loss, entries, values = observe(
        z, KernelArguments(None, "regularize", 1, mean, threshold)
    )
    np.testing.assert_allclose(sums, wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max())
    np.testing.assert_array_equal(entries, numbers)
    np.testing.assert_allclose(values, slopes, rtol=1e-5)
    assert loss == pytest.approx(logs.sum(), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_even_widths_have_the_bits_of_plain(dtype):
    """So that a machine without a compiler goes the same way."""
    z = activations(2500, 512, dtype)
    arguments = KernelArguments(None, "regularize", 1, z.float().mean(0), torch.full((512,), 9.0))
    native, plain = torch.zeros(2, 3 * 512 + 1)
    native_kernels.observe(z, arguments, native)
    kernels.observe(z, arguments, plain)
    assert torch.equal(native[:-1], plain[:-1])


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_torchs_defaults_play_no_part(default):
    z = activations(30, 20, torch.float32)
    arguments = KernelArguments(None, "regularize", 1, z.mean(0), torch.full((20,), 3.0))
    expected = observe(z, arguments)
    backends.decide.cache_clear()
    torch.set_default_dtype(default)
    torch.set_default_device("meta")
    try:
        chosen = backends.choose(L2EConfig(), z.device, z.dtype)
        found = native_kernels.observe(z, arguments, z.new_zeros(61))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert chosen.name == "native"
    torch.testing.assert_close(found[1].sort().values, expected[3].sort().values, rtol=0, atol=0)


def test_a_threshold_that_is_just_reached_selects():
    z = torch.tensor([[1.0, 2.0, 3.0, float("nan"), float("inf")]])
    arguments = KernelArguments(None, "regularize", 1, torch.zeros(5), torch.full((5,), 4.0))
    assert observe(z, arguments)[2].tolist() == [1, 2, 4]


@pytest.mark.parametrize("method", ["none", "regularize"])
def test_nothing_is_selected_before_there_is_a_threshold(method):
    z = activations(30, 20, torch.float32)
    sums, loss, entries, _ = observe(z, KernelArguments(None, method, 1, z.mean(0), None))
    assert (sums[2] == 0).all()
    assert loss == len(entries) == 0


def test_observing_alone_counts_what_would_be_selected():
    z = activations(30, 20, torch.float32)
    arguments = KernelArguments(None, "none", 1, torch.zeros(20), torch.full((20,), 9.0))
    sums, _, entries, _ = observe(z, arguments)
    np.testing.assert_array_equal(sums[2], (z >= 3).sum(0))
    assert len(entries) == 0


def test_any_number_of_threads_gives_the_same_bits(monkeypatch):
    monkeypatch.setattr(native_kernels, "ALONE", 1000)
    z = activations(64, 1100, torch.float32)
    arguments = KernelArguments(None, "regularize", 1, z.mean(0), torch.full((1100,), 3.0))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            sums = torch.zeros(3301)
            results.append((*native_kernels.observe(z, arguments, sums)[:2], sums))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize(("choice", "operation"), [("auto", "_Activated"), ("plain", "inhibit")])
def test_a_bias_is_added_before_the_activation(choice, operation):
    """In the layer's own pass where that is over all entries anyway, as on a GPU."""
    config = L2EConfig(layers="all", kernels=choice)
    layer = L2ELayer(48, config, name="0", inhibited_layers=1).train()
    pre = activations(40, 48, torch.float32).sub_(2).requires_grad_()
    bias = torch.linspace(-1, 1, 48).requires_grad_()
    out, arriving = layer(pre, bias), torch.linspace(0, 1, 40 * 48).view(40, 48)
    assert operation in out.grad_fn.name()
    assert layer.adds_bias(pre) == (choice == "plain")
    wanted = torch.nn.functional.gelu(pre.double() + bias.double())
    near = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(out.double(), wanted, **near)
    found = torch.autograd.grad(out, (pre, bias), arriving)
    expected = torch.autograd.grad(wanted, (pre, bias), arriving.double())
    torch.testing.assert_close(found, expected, **near)


@pytest.mark.parametrize(
    "keys",
    [
        {"selection": "topk"},
        {"selection": "topk", "memel_code_compat": True},
        {"selection": "random"},
    ],
    ids=str,
)
def test_what_a_mask_selects_is_chosen_among_activations(keys):
    """Not among what a second non-linearity makes of them: as where all is done densely."""
    outputs = []
    for choice in ("auto", "plain"):
        config = L2EConfig(
            late_start_step=2, layers="all", method="deactivate", kernels=choice, **keys
        )
        layer = L2ELayer(48, config, name="0", inhibited_layers=1).train()
        controller = Controller([layer], config)
        for step in range(4):
            pre = activations(40, 48, torch.float32).view(4, 10, 48).sub_(2 + step)
            outputs.append(layer(pre))
            controller.step()
    assert not torch.equal(outputs[3], torch.nn.functional.gelu(pre))
    torch.testing.assert_close(outputs[:4], outputs[4:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["regularize", "deactivate"])
def test_a_measured_step_has_the_bits_of_another(method):
    """What is only logged changes neither the gradient nor the statistics."""
    config = L2EConfig(late_start_step=2, weight=0.5, layers="all", method=method)
    found, shares = [], []
    for measured in (False, True):
        layer = L2ELayer(48, config, name="0", inhibited_layers=1).train()
        controller = Controller([layer], config)
        for step in range(5):
            controller.phase.measure = measured
            pre = activations(40, 48, torch.float32).sub_(2).requires_grad_()
            (layer(pre + step) * torch.arange(48)).sum().backward()
            controller.step()
        found.append([pre.grad, *controller.state_dict().values()])
        shares.append(controller.metrics()["0"]["selected_fraction"])
    assert shares[0] == shares[1] > 0.01
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(
    ("made_by", "dtype"),
    [
        (native_kernels, torch.float32),
        (native_kernels, torch.bfloat16),
        (kernels, torch.float32),
        (kernels, torch.bfloat16),
        (kernels, torch.float64),
    ],
)
@pytest.mark.parametrize("activation", list(kernels.APPROXIMATE))
@pytest.mark.parametrize("added", [False, True])
def test_the_gradient_of_selected_entries(made_by, dtype, activation, added):
    """By automatic differentiation in float64; all others stay."""
    generator = torch.Generator().manual_seed(0)
    pre, grad = (torch.randn(2, 70, 33, generator=generator).mul_(3) for _ in range(2))
    pre[0, 0, :8] = torch.tensor([0.0, -0.0, 1e-30, -14.0, 14.0, 1e4, -1e4, 88.0])
    pre, grad = pre.to(dtype), grad.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    entries = torch.randperm(pre.numel(), generator=generator)[:900].int()
    entries = torch.cat([torch.arange(8, dtype=torch.int32), entries[entries >= 8]])
    values = torch.randn(len(entries), generator=generator) if added else None
    to_pre = torch.full_like(grad, 7.0)
    assert not to_pre.is_contiguous()
    made_by.correct(to_pre, grad, pre, activation, entries, values, scale=-0.5, factor=0.3)

    x = pre.double().requires_grad_()
    approximate = kernels.APPROXIMATE[activation]
    arriving = -0.5 * grad.double()
    if values is not None:
        arriving.put_(entries.long(), 0.3 * values.double(), accumulate=True)
    torch.nn.functional.gelu(x, approximate=approximate).backward(arriving)
    wanted = torch.full_like(x, 7.0).put_(entries.long(), x.grad.take(entries.long()))
    rtol, atol = NEAR[dtype]
    torch.testing.assert_close(to_pre.double(), wanted, rtol=rtol, atol=atol)


def test_bf16_gradients_round_to_nearest_and_keep_what_is_no_number():
    grad = torch.tensor([1.00390625, 1.01171875, float("nan"), float("inf"), -float("inf"), 3e38])
    grad.view(torch.int32)[2] = 0x7FFFFFFF  # a number too great to be rounded
    pre = torch.full_like(grad, 50.0).bfloat16()  # where the slope is 1
    entries, to_pre = torch.arange(6, dtype=torch.int32), torch.zeros(6, dtype=torch.bfloat16)
    zeros = torch.zeros(6, dtype=torch.bfloat16)
    native_kernels.correct(to_pre, zeros, pre, "gelu", entries, grad, factor=1.0)
    assert torch.equal(to_pre.nan_to_num(5.0), grad.bfloat16().nan_to_num(5.0))
    assert to_pre[2].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deactivated_entries_are_given_their_new_values(dtype):
    z = activations(400, 677, dtype)
    mean = z.float().mean(0)
    arguments = KernelArguments(None, "deactivate", 1, mean, torch.full((677,), 20.0))
    sums, loss, entries, values = observe(z, arguments)
    assert len(entries) == sums[2].sum() > 100
    assert loss == 0
    torch.testing.assert_close(values, mean[entries.long() % 677].to(dtype), rtol=0, atol=0)


def test_below_least_the_logarithm_is_a_quadratic():
    """Where chance selects, at the mean itself too: of the same value and slope at `least`."""
    z = activations(300, 520, torch.float32)
    z[:3] = mean = z.mean(0)
    least = torch.linspace(0.1, 2, 520)
    everywhere = torch.ones(300, 520, dtype=torch.bool)
    arguments = KernelArguments(None, "regularize", 1, mean, everywhere, least=least)
    _, loss, entries, values = observe(z, arguments)
    assert len(entries) == z.numel()
    x = (z - mean).double().requires_grad_()
    square = x.square()
    below = square < least
    quadratic = least.double().log() + square / least - 1
    log = torch.where(below, quadratic, torch.where(below, 1, square).log()).sum()
    log.backward()
    assert below.sum() > 100
    assert loss == pytest.approx(log.item(), rel=1e-5)
    torch.testing.assert_close(2 * values.double(), x.grad.flatten(), rtol=1e-4, atol=1e-6)


def test_logarithms_of_the_largest_and_smallest_squares():
    """A product of them would leave a double's range."""
    z = torch.tensor([1e19, 1e-19, 3e-20]).repeat(100, 40)
    arguments = KernelArguments(None, "regularize", 1, torch.zeros(120), torch.zeros(120))
    _, loss, _, values = observe(z, arguments)
    squares = z.double().square().clamp(min=torch.finfo(torch.float32).tiny)
    assert loss == pytest.approx(squares.log().sum().item(), rel=1e-6)
    torch.testing.assert_close(values.double(), (z.double() / squares).flatten(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("choice", ["auto", "plain"])
@pytest.mark.parametrize("method", ["none", "regularize", "deactivate"])
@pytest.mark.parametrize("dtype", list(NEAR))
def test_the_layers_gradient(choice, method, dtype):
    """By automatic differentiation of what METHOD says, in float64, of rows that lie apart."""
    config = L2EConfig(late_start_step=2, weight=50.0, layers="all", method=method, kernels=choice)
    layer = L2ELayer(48, config, name="0", inhibited_layers=1).train()
    controller = Controller([layer], config)
    for step in range(5):
        base = activations(40, 48, dtype).view(8, 5, 48).sub_(2 + step / 4)
        pre = base.transpose(0, 1).requires_grad_()
        out = layer(pre)
        arriving = torch.linspace(-1, 1, pre.numel()).view(pre.shape).to(dtype)
        out.backward(arriving)
        state = layer.state
        mean, threshold, selecting = state.mean.double(), state.threshold.double(), state.selecting
        factor = float(state.loss_factor(40))
        controller.step()
    assert selecting
    x = pre.detach().double().requires_grad_()
    z = torch.nn.functional.gelu(x)
    rounded = torch.nn.functional.gelu(pre.detach()).double()
    selected = (rounded - mean) ** 2 >= threshold
    assert 10 < selected.sum() < 400
    if method == "deactivate":
        wanted = torch.where(selected, mean + config.delta * (z.detach() - z), z)
        (wanted * arriving.double()).sum().backward()
        wanted = torch.where(selected, mean, z)
    else:
        loss = torch.where(selected, torch.where(selected, (z - mean) ** 2, 1).log(), 0).sum()
        weighted = loss * factor if method == "regularize" else 0
        ((z * arriving.double()).sum() + weighted).backward()
        wanted = z
    # The layer works in float32: its slopes 1 / (z - mean), and z itself in bf16, are rounded.
    rtol, atol = {torch.bfloat16: (2**-6, 2e-2)}.get(dtype, (1e-4, 1e-5))
    torch.testing.assert_close(out.double(), wanted, rtol=rtol, atol=atol)
    torch.testing.assert_close(pre.grad.double(), x.grad, rtol=rtol, atol=atol)


@pytest.mark.parametrize("choice", ["auto", "plain"])
@pytest.mark.parametrize("method", ["none", "regularize", "deactivate"])
def test_a_batch_without_rows(choice, method):
    config = L2EConfig(late_start_step=2, weight=0.5, layers="all", method=method, kernels=choice)
    layer = L2ELayer(48, config, name="0", inhibited_layers=1).train()
    controller = Controller([layer], config)
    for _ in range(3):
        layer(activations(40, 48, torch.float32))
        controller.step()
    pre = torch.zeros(0, 48, requires_grad=True)
    out = layer(pre)
    out.sum().backward()
    assert out.shape == pre.grad.shape == (0, 48)
    assert layer.state.selecting
    assert float(layer.state.samples) == 0


@pytest.mark.parametrize("choice", ["auto", "plain"])
@pytest.mark.parametrize("method", ["regularize", "deactivate"])
def test_a_gradient_has_no_gradient(choice, method):
    config = L2EConfig(layers="all", method=method, kernels=choice)
    layer = L2ELayer(48, config, name="0", inhibited_layers=1).train()
    pre = activations(40, 48, torch.float32).requires_grad_()
    [gradient] = torch.autograd.grad(layer(pre).square().sum(), pre, create_graph=True)
    with pytest.raises(ValueError, match="no second derivatives"):
        gradient.square().sum().backward()
