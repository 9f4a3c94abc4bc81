"""The layer's arithmetic as Triton kernels: one pass over the activations each way.

The same two functions as in `l2e.kernels`, for a GPU, with a threshold and not a mask. Forward
reads the pre-activation once and writes the layer's output, and on the way sums what the
statistics, the threshold and L_MS need. Backward reads the pre-activation and the arriving
gradient once and writes the gradient to the pre-activation; it recomputes which activations were
selected, so that nothing but the pre-activation is saved.

No atomics: every program sums its own block of tokens in a fixed order into a row of its own, and
one more reduction adds the rows. Two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from l2e import kernels

BLOCK_TOKENS = 256  # tokens one forward program sums: the rows of the partial sums are tokens / 256
TILE_TOKENS = 4  # tokens by neurons in registers at once: one warp a token,
TILE_NEURONS = 256  # eight neighbouring neurons (16 bytes of bf16) a thread
WARPS = 4

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
def _forward(
    pre_pointer,
    mean_pointer,
    limit_pointer,
    out_pointer,
    partial_pointer,
    tokens,
    neurons,
    ACTIVATION: tl.constexpr,
    DEACTIVATE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_NEURONS: tl.constexpr,
):
    block = tl.program_id(0)
    columns = tl.program_id(1) * TILE_NEURONS + tl.arange(0, TILE_NEURONS)
    inside = columns < neurons
    mean = tl.load(mean_pointer + columns, mask=inside, other=0.0)[None, :]
    limit = tl.load(limit_pointer + columns, mask=inside, other=1.0)[None, :]
    sum_d = tl.zeros([TILE_TOKENS, TILE_NEURONS], tl.float32)
    sum_square = tl.zeros([TILE_TOKENS, TILE_NEURONS], tl.float32)
    count = tl.zeros([TILE_TOKENS, TILE_NEURONS], tl.float32)
    sum_log = tl.zeros([TILE_TOKENS, TILE_NEURONS], tl.float32)
    for start in range(0, BLOCK_TOKENS, TILE_TOKENS):
        rows = block * BLOCK_TOKENS + start + tl.arange(0, TILE_TOKENS)
        mask = (rows < tokens)[:, None] & inside[None, :]
        offsets = rows.to(tl.int64)[:, None] * neurons + columns[None, :]
        x = tl.load(pre_pointer + offsets, mask=mask, other=0.0).to(tl.float32)
        z = _activate(x, ACTIVATION).to(out_pointer.dtype.element_ty).to(tl.float32)
        d = tl.where(mask, z - mean, 0.0)
        square = d * d
        selected = mask & (square >= limit)
        out = tl.where(selected, mean, z) if DEACTIVATE else z
        tl.store(out_pointer + offsets, out.to(out_pointer.dtype.element_ty), mask=mask)
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
    gradient_pointer,
    mean_pointer,
    limit_pointer,
    balance_pointer,
    pull_pointer,
    out_pointer,
    tokens,
    neurons,
    delta,
    ACTIVATION: tl.constexpr,
    DEACTIVATE: tl.constexpr,
    BALANCED: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_NEURONS: tl.constexpr,
):
    rows = tl.program_id(0) * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
    columns = tl.program_id(1) * TILE_NEURONS + tl.arange(0, TILE_NEURONS)
    inside = columns < neurons
    mask = (rows < tokens)[:, None] & inside[None, :]
    offsets = rows.to(tl.int64)[:, None] * neurons + columns[None, :]
    mean = tl.load(mean_pointer + columns, mask=inside, other=0.0)[None, :]
    limit = tl.load(limit_pointer + columns, mask=inside, other=1.0)[None, :]
    x = tl.load(pre_pointer + offsets, mask=mask, other=0.0).to(tl.float32)
    gradient = tl.load(gradient_pointer + offsets, mask=mask, other=0.0).to(tl.float32)
    # Rounded as the forward pass rounded it, so that the same activations are selected.
    z = _activate(x, ACTIVATION).to(out_pointer.dtype.element_ty).to(tl.float32)
    d = z - mean
    selected = d * d >= limit
    if DEACTIVATE:
        gradient = tl.where(selected, -delta * gradient, gradient)
    else:
        direction = tl.where(selected, 1.0 / tl.where(selected, d, 1.0), 0.0)
        if BALANCED:
            direction -= d * tl.load(balance_pointer + columns, mask=inside, other=0.0)[None, :]
        gradient += 2.0 * tl.load(pull_pointer) * direction
    gradient *= _slope(x, ACTIVATION)
    tl.store(out_pointer + offsets, gradient.to(out_pointer.dtype.element_ty), mask=mask)


def forward(pre: Tensor, rule: kernels.Rule, sums: Tensor | None) -> Tensor:
    """`kernels.forward` in one pass over `pre`."""
    if sums is None:
        return kernels.forward(pre, rule, None)  # a recomputation, which sums nothing
    tokens, neurons = pre.shape
    limit = torch.full_like(rule.mean, torch.inf) if rule.limit is None else rule.limit
    out = torch.empty_like(pre)
    blocks = triton.cdiv(tokens, BLOCK_TOKENS)
    partial = torch.empty(blocks, 4, neurons, dtype=torch.float32, device=pre.device)
    _forward[(blocks, triton.cdiv(neurons, TILE_NEURONS))](
        pre,
        rule.mean,
        limit,
        out,
        partial,
        tokens,
        neurons,
        ACTIVATION=rule.activation,
        DEACTIVATE=rule.method == "deactivate",
        BLOCK_TOKENS=BLOCK_TOKENS,
        TILE_TOKENS=TILE_TOKENS,
        TILE_NEURONS=TILE_NEURONS,
        num_warps=WARPS,
    )
    total = partial.sum(0).view(-1)
    sums[:-1] += total[: 3 * neurons]
    sums[-1] += total[3 * neurons :].sum()
    return out


def backward(grad: Tensor, pre: Tensor, rule: kernels.Rule, pull: Tensor | float) -> Tensor:
    """`kernels.backward` in one pass over `pre` and `grad`."""
    if rule.limit is None or rule.method == "none":
        return kernels.backward(grad, pre, rule, pull)  # nothing but the activation's own
    tokens, neurons = pre.shape
    out = torch.empty_like(pre)
    if not isinstance(pull, Tensor):
        pull = torch.full((), pull, dtype=torch.float32, device=pre.device)
    grid = (triton.cdiv(tokens, TILE_TOKENS), triton.cdiv(neurons, TILE_NEURONS))
    _backward[grid](
        pre,
        grad.contiguous(),
        rule.mean,
        rule.limit,
        rule.mean if rule.balance is None else rule.balance,
        pull,
        out,
        tokens,
        neurons,
        rule.delta,
        ACTIVATION=rule.activation,
        DEACTIVATE=rule.method == "deactivate",
        BALANCED=rule.balance is not None,
        TILE_TOKENS=TILE_TOKENS,
        TILE_NEURONS=TILE_NEURONS,
        num_warps=WARPS,
    )
    return out
