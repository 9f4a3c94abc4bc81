"""The layer's arithmetic as Triton kernels: one pass over the activations each way.

The same two functions as in `l2e.kernels`, for a GPU, with a threshold and not a mask. Forward
reads the pre-activation once, adds the bias and writes the layer's output, and on the way sums
what the statistics, the threshold and L_MS need. Backward reads the pre-activation and the arriving
gradient once, writes the gradient to the pre-activation and sums the bias's; it recomputes which
activations were selected, so that nothing but the pre-activation is saved.

No atomics: every program sums its own block of tokens in a fixed order into a row of its own, and
one more reduction adds the rows. Two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from l2e import kernels

BLOCK_TOKENS = 256  # tokens one program sums: the rows of the partial sums are tokens / 256
TILE_TOKENS = 4  # tokens by neurons in registers at once: one warp a token,
TILE_NEURONS = 256  # eight neighbouring neurons (16 bytes of bf16) a thread
WARPS = 4
TILES = {
    "BLOCK_TOKENS": BLOCK_TOKENS,
    "TILE_TOKENS": TILE_TOKENS,
    "TILE_NEURONS": TILE_NEURONS,
    "num_warps": WARPS,
}

SQRT_HALF = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_TWO_PI = tl.constexpr(0.3989422804014327)
TANH_SCALE = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
TANH_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _tanh(x):
    shrunk = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """The activation of float32 x."""
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        return 0.5 * x * (1.0 + _tanh((x + x * x * x * TANH_CUBIC) * TANH_SCALE))
    else:
        return x


@triton.jit
def _slope(x, ACTIVATION: tl.constexpr):
    """The activation's derivative at float32 x."""
    if ACTIVATION == "gelu":
        density = tl.exp(-0.5 * x * x) * INVERSE_SQRT_TWO_PI
        return 0.5 * (1.0 + tl.erf(x * SQRT_HALF)) + x * density
    elif ACTIVATION == "gelu_tanh":
        t = _tanh((x + x * x * x * TANH_CUBIC) * TANH_SCALE)
        inner = (1.0 + 3.0 * x * x * TANH_CUBIC) * TANH_SCALE
        return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner
    else:
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def _biased(pre_pointer, offsets, mask, bias, rounded: tl.constexpr):
    """Pre-activations in float32, the bias added and the sum rounded as they are stored."""
    x = tl.load(pre_pointer + offsets, mask=mask, other=0.0).to(tl.float32)
    return (x + bias).to(rounded).to(tl.float32)


@triton.jit
def _forward(
    pre_pointer,
    bias_pointer,
    mean_pointer,
    threshold_pointer,
    out_pointer,
    partial_pointer,
    tokens,
    neurons,
    ACTIVATION: tl.constexpr,
    DEACTIVATE: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_NEURONS: tl.constexpr,
):
    block = tl.program_id(0)
    columns = tl.program_id(1) * TILE_NEURONS + tl.arange(0, TILE_NEURONS)
    inside = columns < neurons
    stored: tl.constexpr = out_pointer.dtype.element_ty
    mean = tl.load(mean_pointer + columns, mask=inside, other=0.0)[None, :]
    threshold = tl.load(threshold_pointer + columns, mask=inside, other=1.0)[None, :]
    bias = tl.zeros([1, TILE_NEURONS], tl.float32)
    if BIASED:
        bias = tl.load(bias_pointer + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    sum_d = tl.zeros([TILE_TOKENS, TILE_NEURONS], tl.float32)
    sum_square = tl.zeros([TILE_TOKENS, TILE_NEURONS], tl.float32)
    count = tl.zeros([TILE_TOKENS, TILE_NEURONS], tl.float32)
    sum_log = tl.zeros([TILE_TOKENS, TILE_NEURONS], tl.float32)
    for start in range(0, BLOCK_TOKENS, TILE_TOKENS):
        rows = block * BLOCK_TOKENS + start + tl.arange(0, TILE_TOKENS)
        mask = (rows < tokens)[:, None] & inside[None, :]
        offsets = rows.to(tl.int64)[:, None] * neurons + columns[None, :]
        x = _biased(pre_pointer, offsets, mask, bias, stored)
        z = _activate(x, ACTIVATION).to(stored).to(tl.float32)
        d = tl.where(mask, z - mean, 0.0)
        square = d * d
        selected = mask & (square >= threshold)
        out = tl.where(selected, mean, z) if DEACTIVATE else z
        tl.store(out_pointer + offsets, out.to(stored), mask=mask)
        sum_d += d
        sum_square += square
        count += selected.to(tl.float32)
        sum_log += tl.where(selected, tl.log(tl.where(selected, square, 1.0)), 0.0)
    partial = partial_pointer + block.to(tl.int64) * 4 * neurons + columns
    tl.store(partial, tl.sum(sum_d, 0), mask=inside)
    tl.store(partial + neurons, tl.sum(sum_square, 0), mask=inside)
    tl.store(partial + 2 * neurons, tl.sum(count, 0), mask=inside)
    tl.store(partial + 3 * neurons, tl.sum(sum_log, 0), mask=inside)


@triton.jit
def _backward(
    pre_pointer,
    bias_pointer,
    gradient_pointer,
    mean_pointer,
    threshold_pointer,
    balance_pointer,
    loss_gradient_pointer,
    out_pointer,
    partial_pointer,
    tokens,
    neurons,
    delta,
    ACTIVATION: tl.constexpr,
    METHOD: tl.constexpr,
    BALANCED: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_NEURONS: tl.constexpr,
):
    block = tl.program_id(0)
    columns = tl.program_id(1) * TILE_NEURONS + tl.arange(0, TILE_NEURONS)
    inside = columns < neurons
    stored: tl.constexpr = out_pointer.dtype.element_ty
    mean = tl.load(mean_pointer + columns, mask=inside, other=0.0)[None, :]
    threshold = tl.load(threshold_pointer + columns, mask=inside, other=1.0)[None, :]
    bias = tl.zeros([1, TILE_NEURONS], tl.float32)
    if BIASED:
        bias = tl.load(bias_pointer + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if BALANCED:
        balance = tl.load(balance_pointer + columns, mask=inside, other=0.0)[None, :]
    loss_gradient = 2.0 * tl.load(loss_gradient_pointer)
    total = tl.zeros([TILE_TOKENS, TILE_NEURONS], tl.float32)
    for start in range(0, BLOCK_TOKENS, TILE_TOKENS):
        rows = block * BLOCK_TOKENS + start + tl.arange(0, TILE_TOKENS)
        mask = (rows < tokens)[:, None] & inside[None, :]
        offsets = rows.to(tl.int64)[:, None] * neurons + columns[None, :]
        x = _biased(pre_pointer, offsets, mask, bias, stored)
        gradient = tl.load(gradient_pointer + offsets, mask=mask, other=0.0).to(tl.float32)
        if METHOD != "none":
            # Rounded as the forward pass rounded it, so that the same activations are selected.
            d = _activate(x, ACTIVATION).to(stored).to(tl.float32) - mean
            selected = d * d >= threshold
            if METHOD == "deactivate":
                gradient = tl.where(selected, -delta * gradient, gradient)
            else:
                direction = tl.where(selected, 1.0 / tl.where(selected, d, 1.0), 0.0)
                if BALANCED:
                    direction -= d * balance
                gradient += loss_gradient * direction
        out = tl.where(mask, gradient * _slope(x, ACTIVATION), 0.0).to(stored)
        tl.store(out_pointer + offsets, out, mask=mask)
        total += out.to(tl.float32)
    if BIASED:
        tl.store(
            partial_pointer + block.to(tl.int64) * neurons + columns,
            tl.sum(total, 0),
            mask=inside,
        )


def forward(pre: Tensor, arguments: kernels.KernelArguments, sums: Tensor | None) -> Tensor:
    """`kernels.forward` in one pass over `pre`."""
    if sums is None:
        return kernels.forward(pre, arguments, None)  # a recomputation, which sums nothing
    tokens, neurons = pre.shape
    threshold = (
        torch.full_like(arguments.mean, torch.inf)
        if arguments.threshold is None
        else arguments.threshold
    )
    out = torch.empty_like(pre)
    blocks = triton.cdiv(tokens, BLOCK_TOKENS)
    partial = torch.empty(blocks, 4, neurons, dtype=torch.float32, device=pre.device)
    _forward[(blocks, triton.cdiv(neurons, TILE_NEURONS))](
        pre,
        pre if arguments.bias is None else arguments.bias,
        arguments.mean,
        threshold,
        out,
        partial,
        tokens,
        neurons,
        ACTIVATION=arguments.activation,
        DEACTIVATE=arguments.method == "deactivate",
        BIASED=arguments.bias is not None,
        **TILES,
    )
    total = partial.sum(0).view(-1)
    sums[:-1] += total[: 3 * neurons]
    sums[-1] += total[3 * neurons :].sum()
    return out


def backward(
    grad: Tensor, pre: Tensor, arguments: kernels.KernelArguments, loss_gradient: Tensor | float
) -> kernels.Gradients:
    """`kernels.backward` in one pass over `pre` and `grad`."""
    tokens, neurons = pre.shape
    out = torch.empty_like(pre)
    blocks = triton.cdiv(tokens, BLOCK_TOKENS)
    partial = None
    if arguments.bias is not None:
        partial = torch.empty(blocks, neurons, dtype=torch.float32, device=pre.device)
    if not isinstance(loss_gradient, Tensor):
        loss_gradient = torch.full((), loss_gradient, dtype=torch.float32, device=pre.device)
    # Pointers that a variant of the kernel does not read must still point somewhere.
    _backward[(blocks, triton.cdiv(neurons, TILE_NEURONS))](
        pre,
        pre if arguments.bias is None else arguments.bias,
        grad.contiguous(),
        arguments.mean,
        arguments.mean if arguments.threshold is None else arguments.threshold,
        arguments.mean if arguments.balance is None else arguments.balance,
        loss_gradient,
        out,
        out if partial is None else partial,
        tokens,
        neurons,
        arguments.delta,
        ACTIVATION=arguments.activation,
        METHOD="none" if arguments.threshold is None else arguments.method,
        BALANCED=arguments.balance is not None,
        BIASED=arguments.bias is not None,
        **TILES,
    )
    return out, None if partial is None else partial.sum(0).to(pre.dtype)
