"""The chunked cross-entropy against torch's own in float64."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from model import loss as loss_module
from model.loss import cross_entropy

pytestmark = pytest.mark.usefixtures("one_process", "softmax")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, HIDDEN, ROWS, VOCAB = 50, 24, 128, 101


@pytest.fixture(params=["plain", "triton"])
def softmax(request, monkeypatch):
    """Both implementations; Triton's is interpreted where there is no GPU."""
    if request.param == "triton":
        pytest.importorskip("triton")
        from model import triton_loss

        monkeypatch.setattr(loss_module, "fused_softmax", lambda *_: triton_loss.softmax)
    return request.param


def sample(scale: float = 1.0, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = (scale * torch.randn(TOKENS, HIDDEN, generator=generator)).to(dtype)
    weight = torch.randn(ROWS, HIDDEN, generator=generator).to(dtype)
    labels = torch.randint(VOCAB, (TOKENS,), generator=generator)
    hidden, weight, labels = (tensor.to(DEVICE) for tensor in (hidden, weight, labels))
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def reference(hidden, weight, labels):
    """Loss and gradients in float64, over the real rows alone."""
    hidden = hidden.detach().double().requires_grad_()
    weight = weight.detach().double().requires_grad_()
    loss = F.cross_entropy(hidden @ weight[:VOCAB].T, labels)
    return loss, *torch.autograd.grad(loss, (hidden, weight))


def ours(hidden, weight, labels, scale: float = 1.0):
    loss = cross_entropy(hidden, weight, labels, VOCAB, dist.group.WORLD)
    return loss, *torch.autograd.grad(loss * scale, (hidden, weight))


@pytest.fixture(params=[1, 7, 25, 1000], ids="{} tokens a chunk".format)
def chunk(request, monkeypatch):
    """Of float32, in slices of a third of it."""
    monkeypatch.setitem(loss_module.CHUNK_BYTES, DEVICE, 4 * ROWS * request.param)
    monkeypatch.setitem(loss_module.SLICE_BYTES, DEVICE, 4 * ROWS * request.param // 3)
    return request.param


@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["flat", "peaked"])
def test_float32(chunk, scale):
    inputs = sample(scale)
    for value, exact in zip(ours(*inputs), reference(*inputs), strict=True):
        assert (value - exact).norm() / exact.norm() < 1e-6


def test_bfloat16_within_its_rounding(chunk):
    inputs = sample(dtype=torch.bfloat16)
    results = ours(*inputs)
    assert [value.dtype for value in results] == [torch.float32] + 2 * [torch.bfloat16]
    for value, exact in zip(results, reference(*inputs), strict=True):
        assert (value - exact).norm() / exact.norm() < 2**-7


def test_float16_gradients_keep_the_loss_scale(chunk):
    inputs = sample(dtype=torch.float16)
    _, hidden_gradient, weight_gradient = ours(*inputs, scale=2.0**10)
    _, exact_hidden, exact_weight = reference(*inputs)
    assert (hidden_gradient / 2**10 - exact_hidden).norm() / exact_hidden.norm() < 2**-9
    assert (weight_gradient / 2**10 - exact_weight).norm() / exact_weight.norm() < 2**-9


def test_padding_rows_get_no_gradient_and_no_probability():
    hidden, weight, labels = sample()
    with torch.no_grad():
        weight[VOCAB:] = 100.0
    loss, _, weight_gradient = ours(hidden, weight, labels)
    assert not weight_gradient[VOCAB:].any()
    assert loss.item() == pytest.approx(reference(hidden, weight, labels)[0].item(), rel=1e-6)


def test_a_far_improbable_label_has_a_finite_loss():
    hidden = torch.tensor([[200.0]], device=DEVICE, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], device=DEVICE, requires_grad=True)
    labels = torch.tensor([1], device=DEVICE)
    loss = cross_entropy(hidden, weight, labels, 2, dist.group.WORLD)
    assert loss.item() == 400.0


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor any operation made, in bytes, within `with`."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_a_chunk_of_logits(monkeypatch, dtype):
    monkeypatch.setitem(loss_module.CHUNK_BYTES, DEVICE, 4 * ROWS * HIDDEN)
    monkeypatch.setitem(loss_module.SLICE_BYTES, DEVICE, 4 * ROWS * HIDDEN)
    inputs = sample(dtype=dtype)
    with LargestTensor() as largest:
        ours(*inputs)
    # Of 24 tokens in float32 or 48 in bf16: just as large as the weight's float32 gradient.
    assert largest.bytes == 4 * ROWS * HIDDEN


def test_without_gradients_none_are_computed():
    """Evaluation must not pay for the two products of the gradients."""
    hidden, weight, labels = sample()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loss = cross_entropy(hidden, weight, labels, VOCAB, dist.group.WORLD)
    assert counter.get_total_flops() == 2 * TOKENS * HIDDEN * ROWS  # the logits alone
    assert loss.item() == pytest.approx(reference(hidden, weight, labels)[0].item(), rel=1e-6)


def test_on_a_gpu_logits_are_touched_by_products_and_the_two_kernels_alone(monkeypatch):
    """6 bytes a logit beside the matrix products: one read for the sums, one read and one write."""
    triton_loss = pytest.importorskip("model.triton_loss")
    launched = []

    class Noted:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda logits, *_, **__: launched.append((self.name, grid, logits.shape))

    for name in ("normaliser_kernel", "gradient_kernel"):
        monkeypatch.setattr(triton_loss, name, Noted(name))
    monkeypatch.setattr(loss_module, "fused_softmax", lambda *_: triton_loss.softmax)
    monkeypatch.setitem(loss_module.CHUNK_BYTES, DEVICE, 2 * ROWS * 25)
    with Touched(25 * ROWS) as touched:
        ours(*sample(dtype=torch.bfloat16))
    assert set(touched.names) <= {"mm"}
    names = [name for name, *_ in launched]
    assert names == ["normaliser_kernel", "gradient_kernel"] * 2
    assert {(grid, shape) for _, grid, shape in launched} == {((25,), (25, ROWS))}


class Touched(TorchDispatchMode):
    """Names of the operations that compute on [25, ROWS] logits or larger, within `with`."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.entries, self.names = entries, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [x for x in (*args, result) if isinstance(x, torch.Tensor)]
        # Not the weight and its gradient, which have HIDDEN columns.
        logits = [x for x in tensors if x.numel() >= self.entries and ROWS in x.shape[-1:]]
        if logits and name not in ("t", "slice", "view", "empty", "new_empty", "detach"):
            self.names.append(name)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_before_triton_is_used_works_where_gradients_are_off(dtype):
    """As inside the autograd function that asks; a softmax that is off is found there too."""
    triton_loss = pytest.importorskip("model.triton_loss")

    def sloppy(logits, *arguments):
        losses = triton_loss.softmax(logits, *arguments)
        logits *= 1.1
        return losses

    with torch.no_grad():
        assert loss_module.disagreement(triton_loss.softmax, torch.device(DEVICE), dtype) is None
        found = loss_module.disagreement(sloppy, torch.device(DEVICE), dtype)
    assert "differs from float64" in found
