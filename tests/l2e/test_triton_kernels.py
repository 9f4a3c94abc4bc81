"""Both kinds of kernels against float64 arithmetic; Triton's compiled on a GPU or interpreted."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from l2e import kernels
from l2e.kernels import KernelArguments
from l2e.threshold import BINS, HIGHEST, LOWEST

pytest.importorskip("triton")
from l2e import triton_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    None: lambda x: x,
}


BOTH = pytest.mark.parametrize("made_by", [kernels, triton_kernels], ids=["plain", "triton"])


def arguments(neurons: int, generator: torch.Generator, **changes) -> KernelArguments:
    mean = torch.randn(neurons, generator=generator) * 0.3
    threshold = torch.rand(neurons, generator=generator) * 2 + 0.5
    keys = {"activation": "gelu", "method": "regularize", "delta": 1.0} | changes
    return KernelArguments(
        mean=mean.to(DEVICE), threshold=keys.pop("threshold", threshold.to(DEVICE)), **keys
    )


def draw(tokens: int, neurons: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    values = torch.randn(tokens, neurons, generator=generator) * 1.5
    return values.to(dtype).to(DEVICE)


def expected_sums(out: Tensor, arguments: KernelArguments) -> Tensor:
    """The four sums in float64, of the activations as the next layer sees them."""
    deviation = out.double() - arguments.mean.double()
    selected = (out.float() - arguments.mean).square() >= arguments.threshold
    logs = torch.where(selected, deviation.square().log(), 0)
    return torch.stack([deviation.sum(0), deviation.square().sum(0), selected.sum(0), logs.sum(0)])


def draw_bias(wanted: bool, neurons: int, dtype: torch.dtype, generator: torch.Generator):
    return draw(1, neurons, dtype, generator)[0] if wanted else None


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    error = (found.double() - wanted.double()).abs().max()
    assert error <= tolerance * wanted.double().abs().max(), float(error)


def new_sums(neurons: int) -> Tensor:
    return torch.zeros(3 * neurons + 1, device=DEVICE)


# The interpreter truncates to bfloat16 where a GPU rounds: one unit in the last place, not a half.
PRECISION = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@BOTH
@settings(max_examples=8, deadline=None, phases=[Phase.reuse, Phase.generate])
@given(
    tokens=st.integers(1, 600),
    neurons=st.integers(1, 300),
    activation=st.sampled_from(["gelu", "gelu_tanh", None]),
    dtype=st.sampled_from(list(PRECISION)),
    biased=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_forward_sums_what_it_returns(made_by, tokens, neurons, activation, dtype, biased, seed):
    generator = torch.Generator().manual_seed(seed)
    bias = draw_bias(biased, neurons, dtype, generator)
    inhibit = arguments(neurons, generator, activation=activation, bias=bias)
    pre = draw(tokens, neurons, dtype, generator)
    sums = new_sums(neurons)
    out = made_by.forward(pre, inhibit, sums)
    assert out.dtype == dtype
    x = pre.double() if bias is None else pre.double() + bias.double()
    # Pre-activation and activation are each rounded once.
    close(out, ACTIVATIONS[activation](x), (2 if biased else 1) * PRECISION[dtype])
    wanted = expected_sums(out, inhibit)
    close(sums[: 2 * neurons], wanted[:2].flatten(), 1e-6)
    assert torch.equal(sums[2 * neurons : -1].double(), wanted[2])
    assert sums[-1].item() == pytest.approx(wanted[3].sum().item(), rel=1e-5, abs=1e-5)


@BOTH
@settings(max_examples=8, deadline=None, phases=[Phase.reuse, Phase.generate])
@given(
    tokens=st.integers(1, 200),
    neurons=st.integers(1, 300),
    activation=st.sampled_from(["gelu", "gelu_tanh", None]),
    dtype=st.sampled_from(list(PRECISION)),
    balanced=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_backward_is_the_gradient_of_the_output_and_of_the_logs(
    made_by, tokens, neurons, activation, dtype, balanced, biased, seed
):
    generator = torch.Generator().manual_seed(seed)
    balance = torch.rand(neurons, generator=generator).to(DEVICE) if balanced else None
    bias = draw_bias(biased, neurons, dtype, generator)
    inhibit = arguments(neurons, generator, activation=activation, balance=balance, bias=bias)
    pre, grad = (draw(tokens, neurons, dtype, generator) for _ in range(2))
    out = made_by.forward(pre, inhibit, new_sums(neurons))
    selected = (out.float() - inhibit.mean).square() >= inhibit.threshold

    x = (pre.double() if bias is None else pre.double() + bias.double()).requires_grad_()
    z = ACTIVATIONS[activation](x)
    seen = z + (out.double() - z).detach()  # the rounded activation, with the exact slope
    deviation = seen - inhibit.mean.double()
    logs = torch.where(selected, deviation.square(), 1).log().sum()
    if balanced:
        logs = logs - (deviation.square() * balance.double()).sum()
    ((z * grad.double()).sum() + 0.3 * logs).backward(retain_graph=True)
    found, bias_gradient = made_by.backward(grad, pre, inhibit, loss_gradient=0.3)
    # Plain operations round the gradient to z and the result; with a bias the slope is taken at
    # the rounded sum.
    roundings = (2 if made_by is kernels else 1) + (2 if biased else 0)
    close(found, x.grad, roundings * PRECISION[dtype])
    if biased:
        assert bias_gradient.dtype == dtype
        summed = found.double().sum(0)
        error = (bias_gradient.double() - summed).abs().max()
        assert error <= PRECISION[dtype] * found.double().abs().sum(0).max()
    else:
        assert bias_gradient is None
    squares = torch.ones(2, device=DEVICE)
    factor = torch.tensor(0.3, device=DEVICE)
    as_tensor, _ = made_by.backward(grad, pre, inhibit, factor, squares)
    assert torch.equal(found, as_tensor)
    [of_logs] = torch.autograd.grad(logs, z)
    close(squares[0], grad.double().square().sum() + 1, 1e-5)
    close(squares[1], (of_logs / 2).square().sum() + 1, 1e-5)


@BOTH
def test_deactivation_puts_the_mean_and_turns_the_gradient(made_by):
    generator = torch.Generator().manual_seed(0)
    inhibit = arguments(40, generator, activation=None, method="deactivate", delta=3.0)
    pre, grad = (draw(30, 40, torch.float32, generator) for _ in range(2))
    selected = (pre - inhibit.mean).square() >= inhibit.threshold
    assert 0 < selected.sum() < selected.numel()
    out = made_by.forward(pre, inhibit, new_sums(40))
    assert torch.equal(out, torch.where(selected, inhibit.mean, pre))
    found, _ = made_by.backward(grad, pre, inhibit, 0.0)
    assert torch.equal(found, torch.where(selected, -3.0 * grad, grad))


@pytest.mark.parametrize("dtype", list(PRECISION))
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_far_from_zero_gelu_and_its_slope_are_their_limits(activation, dtype):
    """torch's own are NaN at -inf, and in some precisions at inf; a NaN stays one."""
    observe = arguments(1, torch.Generator(), activation=activation, threshold=None)
    far = [float("inf"), 6e4, 300.0, -300.0, -6e4, -float("inf"), float("nan")]
    pre = torch.tensor(far, device=DEVICE).to(dtype)[:, None]
    out = triton_kernels.forward(pre, observe, None)
    assert torch.equal(out[:6], pre[:6].clamp(min=0))
    slope, _ = triton_kernels.backward(torch.ones_like(pre), pre, observe, 0.0)
    assert slope[:6].flatten().tolist() == [1, 1, 1, 0, 0, 0]
    assert out[6].isnan()
    assert slope[6].isnan()


@BOTH
def test_nothing_is_selected_before_there_is_a_threshold(made_by):
    generator = torch.Generator().manual_seed(0)
    observe = arguments(20, generator, threshold=None)
    pre, grad = (draw(50, 20, torch.float32, generator) for _ in range(2))
    sums = new_sums(20)
    close(made_by.forward(pre, observe, sums), F.gelu(pre.double()), 1e-6)
    assert not sums[40:].any()
    x = pre.double().requires_grad_()
    F.gelu(x).backward(grad.double())
    close(made_by.backward(grad, pre, observe, 0.3)[0], x.grad, 1e-6)


@BOTH
def test_sums_are_added_to_what_is_there_and_repeat_bit_for_bit(made_by):
    generator = torch.Generator().manual_seed(0)
    inhibit, pre = arguments(70, generator), draw(700, 70, torch.float32, generator)
    once, twice, again = new_sums(70), new_sums(70), new_sums(70)
    made_by.forward(pre, inhibit, once)
    made_by.forward(pre, inhibit, again)
    assert torch.equal(once, again)
    for _ in range(2):
        made_by.forward(pre, inhibit, twice)
    assert torch.equal(twice, 2 * once)


@BOTH
def test_a_mean_far_from_zero_costs_no_accuracy(made_by):
    """Raw sums of squares around zero would lose all digits of a spread of 1 around 10,000."""
    generator = torch.Generator().manual_seed(0)
    pre = draw(512, 16, torch.float32, generator) + 1e4
    far = KernelArguments("gelu", "regularize", 1.0, torch.full((16,), 1e4, device=DEVICE), None)
    sums = new_sums(16)
    made_by.forward(pre, far, sums)
    deviation = pre.double() - 1e4
    close(sums[16:32], deviation.square().sum(0), 1e-6)


@BOTH
@settings(max_examples=6, deadline=None, phases=[Phase.reuse, Phase.generate])
@given(
    tokens=st.integers(1, 300),
    neurons=st.integers(1, 300),
    activation=st.sampled_from(["gelu", "gelu_tanh", None]),
    dtype=st.sampled_from(list(PRECISION)),
    seed=st.integers(0, 1000),
)
def test_measured_is_the_fourth_moment_the_largest_and_the_histogram(
    made_by, tokens, neurons, activation, dtype, seed
):
    generator = torch.Generator().manual_seed(seed)
    observe = arguments(neurons, generator, activation=activation)
    pre = draw(tokens, neurons, dtype, generator)
    denominator = (torch.rand(neurons, generator=generator) + 0.1).to(DEVICE)
    z = made_by.forward(pre, observe, new_sums(neurons)).double()
    fourth, largest = torch.ones(neurons, device=DEVICE), torch.zeros((), device=DEVICE)
    counts = torch.ones(BINS, dtype=torch.int64, device=DEVICE)
    made_by.measure(pre, observe, denominator, fourth, largest, counts)
    deviation = z - observe.mean.double()
    scale = deviation.square() / denominator
    close(fourth - 1, deviation.pow(4).sum(0), 1e-5)
    close(largest, scale.max(), 1e-5)
    wanted, _ = np.histogram(
        scale.log2().clamp(LOWEST, HIGHEST - 1e-9).cpu(), BINS, (LOWEST, HIGHEST)
    )
    # Rounding may move what lies at a bin's edge to its neighbour.
    ahead = (counts.cpu().numpy() - 1 - wanted).cumsum()
    assert ahead[-1] == 0
    assert np.abs(ahead).max() <= 1 + tokens * neurons / 1000


@BOTH
def test_no_tokens_are_no_error(made_by):
    generator = torch.Generator().manual_seed(0)
    inhibit = arguments(20, generator, bias=draw(1, 20, torch.float32, generator)[0])
    pre, sums = torch.empty(0, 20, device=DEVICE), new_sums(20)
    assert made_by.forward(pre, inhibit, sums).shape == (0, 20)
    gradient, bias_gradient = made_by.backward(pre, pre, inhibit, 0.3)
    assert gradient.shape == (0, 20)
    assert not bias_gradient.any()
    counts = torch.zeros(BINS, dtype=torch.int64, device=DEVICE)
    made_by.measure(pre, inhibit, inhibit.threshold, sums[:20], sums[-1], counts)
    assert not sums.any()
    assert not counts.any()
