"""The layer's arithmetic as Triton kernels: one pass over the activations each way.

The same functions as in `l2e.kernels`, for a GPU, with a threshold and not a mask. Forward reads
the pre-activation once, adds the bias and writes the layer's output, and on the way sums what the
statistics, the threshold and L_MS need. Backward reads the pre-activation and the arriving gradient
once, writes the gradient to the pre-activation and sums the bias's; it recomputes which activations
were selected, so that nothing but the pre-activation is saved.

A GPU reads an activation in the time of about 30 instructions, so the functions below are the
shortest that are right: in half precisions GELU is within 2e-7 of the exact one, and within half a
unit of bfloat16's last place; in float32 it is exact.

No atomics but on integers: every program sums its own tokens in a fixed order into a row of its
own, and one more reduction adds the rows. Two runs on one kind of GPU give the same bits.
"""

from __future__ import annotations

import os
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from l2e import kernels
from l2e.threshold import BINS, BINS_PER_OCTAVE, LOWEST

# What a program holds in registers at once: one token a warp, 16 bytes of its neurons a thread.
WARPS = 2
VECTOR_BYTES = 16
PROGRAMS_INTERPRETED = 6
# Of a thread; the compiler is told, and so spills none. With 80 a multiprocessor runs 12 programs.
REGISTERS = 80
REGISTERS_COMPARING = 88  # of the backward pass that sums squares of gradients besides: 11 programs
PROCESSOR_REGISTERS = 65536

COMPILED = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")
LOG_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
SQRT_HALF = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_TWO_PI = tl.constexpr(0.3989422804014327)
TANH_SCALE = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
TANH_CUBIC = tl.constexpr(0.044715)
FAR = tl.constexpr(
    1e4
)  # from here on GELU is x or 0 in every precision: what multiplies x vanishes
HALF_UNIT = tl.constexpr(5.961e-8)  # a little over half of float32's last place
HISTOGRAM_LOWEST = tl.constexpr(LOWEST)
HISTOGRAM_BINS = tl.constexpr(BINS)
HISTOGRAM_BINS_PER_OCTAVE = tl.constexpr(BINS_PER_OCTAVE)
# -log2 of a normal variable's probability to exceed a, for 0 <= a <= 10: a minimax polynomial. Its
# error changes GELU by less than 2e-7 and by less than 2**-9 of itself.
TAIL_0 = tl.constexpr(1.0000029802322388)
TAIL_1 = tl.constexpr(1.1511549949645996)
TAIL_2 = tl.constexpr(0.4588037133216858)
TAIL_3 = tl.constexpr(0.05349651351571083)
TAIL_4 = tl.constexpr(-0.008220115676522255)
TAIL_5 = tl.constexpr(0.0008453851332888007)
TAIL_6 = tl.constexpr(-5.0171915063401684e-05)
TAIL_7 = tl.constexpr(1.2744189916702453e-06)


@triton.jit
def _exp2(x):
    """2^x in one instruction, within 2 units of the last place."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def _log2(x):
    """log2 x in one instruction, within 2^-22."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def _reciprocal(x):
    """1 / x in one instruction, within 1 unit of the last place."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """Float32 x as it is stored; two at a time, which is the fast instruction."""
    if COMPILED and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    elif COMPILED and dtype == tl.float16:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        return x.to(dtype)


@triton.jit
def _float(x):
    """x in float32; bfloat16, whose bits are float32's first half, two at a time."""
    if COMPILED and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=r,=r,r",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        return x.to(tl.float32)


@triton.jit
def _biased(x, bias, dtype: tl.constexpr):
    """In float32: x and the bias (or None), rounded as `dtype`. A GPU adds two halves at a time."""
    if bias is None:
        return _float(x)
    elif COMPILED:
        return _float(x + bias)
    else:  # the interpreter does not add bfloat16
        return (x.to(tl.float32) + bias.to(tl.float32)).to(dtype).to(tl.float32)


@triton.jit
def _tail(x, dtype: tl.constexpr):
    """The probability that a normal variable exceeds |x|, as accurate as `dtype` needs it."""
    a = tl.abs(x)
    if dtype == tl.float32:
        return tl.fma(tl.erf(a * SQRT_HALF), -0.5, 0.5)
    p = tl.fma(a, TAIL_7, TAIL_6)
    p = tl.fma(p, a, TAIL_5)
    p = tl.fma(p, a, TAIL_4)
    p = tl.fma(p, a, TAIL_3)
    p = tl.fma(p, a, TAIL_2)
    p = tl.fma(p, a, TAIL_1)
    p = tl.fma(p, a, TAIL_0)
    return _exp2(-p)


@triton.jit
def _sigmoid_of_tanh(x):
    """(1 + tanh u) / 2 of the tanh form's u, as 1 / (1 + exp(-2 u))."""
    u = x * tl.fma(x * x, -2.0 * LOG2_E * TANH_SCALE * TANH_CUBIC, -2.0 * LOG2_E * TANH_SCALE)
    return _reciprocal(1.0 + _exp2(u))


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr, dtype: tl.constexpr):
    """The activation of float32 x, to be stored as `dtype`; of infinite x its limit."""
    if ACTIVATION == "gelu":
        return tl.fma(-tl.minimum(tl.abs(x), FAR), _tail(x, dtype), tl.maximum(x, 0.0))
    elif ACTIVATION == "gelu_tanh":
        return tl.maximum(x, -FAR) * _sigmoid_of_tanh(x)
    else:
        return x


@triton.jit
def _slope(x, ACTIVATION: tl.constexpr, dtype: tl.constexpr):
    """The activation's derivative at float32 x; at infinite x its limit."""
    near = tl.minimum(tl.maximum(x, -FAR), FAR)
    if ACTIVATION == "gelu":
        tail = _tail(x, dtype)
        density = _exp2(x * x * (-0.5 * LOG2_E)) * INVERSE_SQRT_TWO_PI
        return tl.fma(near, density, tl.where(x < 0.0, tail, 1.0 - tail))
    elif ACTIVATION == "gelu_tanh":
        s = _sigmoid_of_tanh(x)
        inner = tl.fma(near * near, 6.0 * TANH_SCALE * TANH_CUBIC, 2.0 * TANH_SCALE)
        return tl.fma(near * s * (1.0 - s), inner, s)
    else:
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def _root(threshold):
    """The least |d| with d * d >= threshold as float32 rounds it: one comparison saves a product.

    The rounded square root is at most one unit off.
    """
    root = tl.sqrt_rn(threshold)
    below = tl.fma(root, -HALF_UNIT, root)
    above = tl.fma(root, HALF_UNIT, root)
    return tl.where(
        below * below >= threshold, below, tl.where(root * root >= threshold, root, above)
    )


@triton.jit
def _sum_of_log2(
    sizes, TILE_TOKENS: tl.constexpr, TILE_NEURONS: tl.constexpr, VECTOR: tl.constexpr
):
    """[tokens, neurons] -> [tokens, neurons / VECTOR]: sums of a thread's own logarithms.

    Pairs are multiplied first. Selected are (z - mean)^2 from float32's least normal number on, so
    that the product of two roots of them does not vanish.
    """
    one, other = tl.split(tl.reshape(sizes, [TILE_TOKENS, TILE_NEURONS // 2, 2]))
    logs = tl.reshape(_log2(one * other), [TILE_TOKENS, TILE_NEURONS // VECTOR, VECTOR // 2])
    return tl.sum(logs, 2)


@triton.jit
def _sum_of_squares(
    values, TILE_TOKENS: tl.constexpr, TILE_NEURONS: tl.constexpr, VECTOR: tl.constexpr
):
    """[tokens, neurons] -> [tokens, neurons / VECTOR]: sums of a thread's own squares."""
    own = tl.reshape(values * values, [TILE_TOKENS, TILE_NEURONS // VECTOR, VECTOR])
    return tl.sum(own, 2)


@triton.jit
def _offsets(row, columns, neurons, TILE_TOKENS: tl.constexpr):
    rows = row + tl.arange(0, TILE_TOKENS)
    return rows.to(tl.int64)[:, None] * neurons + columns[None, :]


@triton.jit
def _inside(row, columns, tokens, neurons, TILE_TOKENS: tl.constexpr):
    rows = row + tl.arange(0, TILE_TOKENS)
    return (rows < tokens)[:, None] & (columns < neurons)[None, :]


@triton.jit
def _load(
    pointer, row, columns, last, tokens, neurons, EVEN: tl.constexpr, TILE_TOKENS: tl.constexpr
):
    """A tile from `row` on, 0 outside the tensor; of an even one past the `last` tile, that."""
    if EVEN:
        return tl.load(pointer + _offsets(tl.minimum(row, last), columns, neurons, TILE_TOKENS))
    else:
        return tl.load(
            pointer + _offsets(row, columns, neurons, TILE_TOKENS),
            mask=_inside(row, columns, tokens, neurons, TILE_TOKENS),
            other=0.0,
        )


@triton.jit
def _store(
    pointer, values, row, columns, tokens, neurons, EVEN: tl.constexpr, TILE_TOKENS: tl.constexpr
):
    offsets = _offsets(row, columns, neurons, TILE_TOKENS)
    if EVEN:
        tl.store(pointer + offsets, values)
    else:
        mask = _inside(row, columns, tokens, neurons, TILE_TOKENS)
        tl.store(pointer + offsets, values, mask=mask)


@triton.jit
def forward_kernel(
    pre_pointer,
    bias_pointer,
    mean_pointer,
    threshold_pointer,
    out_pointer,
    partial_pointer,
    tokens,
    neurons,
    program_tokens,
    ACTIVATION: tl.constexpr,
    METHOD: tl.constexpr,
    SELECTING: tl.constexpr,
    SUMMING: tl.constexpr,
    BIASED: tl.constexpr,
    EVEN: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_NEURONS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    tile = tl.program_id(1)
    columns = tile * TILE_NEURONS + tl.arange(0, TILE_NEURONS)
    inside = columns < neurons
    stored: tl.constexpr = out_pointer.dtype.element_ty
    mean = tl.load(mean_pointer + columns, mask=inside, other=0.0)[None, :]
    if SELECTING:
        root = _root(tl.load(threshold_pointer + columns, mask=inside, other=1.0)[None, :])
    bias = None
    if BIASED:
        bias = tl.load(bias_pointer + columns, mask=inside, other=0.0)[None, :]
    sum_d = tl.zeros([TILE_TOKENS, TILE_NEURONS], tl.float32)
    sum_square = tl.zeros([TILE_TOKENS, TILE_NEURONS], tl.float32)
    count = tl.zeros([TILE_TOKENS, TILE_NEURONS], tl.float32)
    sum_log = tl.zeros([TILE_TOKENS, TILE_NEURONS // VECTOR], tl.float32)
    first = tl.program_id(0) * program_tokens
    end = tl.minimum(first + program_tokens, tokens)
    last = end - TILE_TOKENS
    ahead = _load(pre_pointer, first, columns, last, tokens, neurons, EVEN, TILE_TOKENS)
    for row in range(first, end, TILE_TOKENS):
        x = _biased(ahead, bias, stored)
        ahead = _load(
            pre_pointer, row + TILE_TOKENS, columns, last, tokens, neurons, EVEN, TILE_TOKENS
        )
        z = _rounded(_activate(x, ACTIVATION, stored), stored)
        if SUMMING or METHOD == "deactivate":
            d = _float(z) - mean
            if not EVEN:
                d = tl.where(_inside(row, columns, tokens, neurons, TILE_TOKENS), d, 0.0)
            if SELECTING:
                selected = tl.abs(d) >= root
                if METHOD == "deactivate":
                    z = tl.where(selected, mean.to(stored), z)
            if SUMMING:
                sum_d += d
                sum_square = tl.fma(d, d, sum_square)
                if SELECTING:
                    count += selected.to(tl.float32)
                    if METHOD == "regularize":
                        sizes = tl.where(selected, tl.abs(d), 1.0)
                        sum_log += _sum_of_log2(sizes, TILE_TOKENS, TILE_NEURONS, VECTOR)
        _store(out_pointer, z, row, columns, tokens, neurons, EVEN, TILE_TOKENS)
    if SUMMING:
        partial = partial_pointer + tl.program_id(0) * (3 * neurons + tl.num_programs(1))
        tl.store(partial + columns, tl.sum(sum_d, 0), mask=inside)
        tl.store(partial + neurons + columns, tl.sum(sum_square, 0), mask=inside)
        tl.store(partial + 2 * neurons + columns, tl.sum(count, 0), mask=inside)
        tl.store(partial + 3 * neurons + tile, tl.sum(sum_log) * (2.0 * LOG_2))


@triton.jit
def backward_kernel(
    pre_pointer,
    bias_pointer,
    gradient_pointer,
    mean_pointer,
    threshold_pointer,
    balance_pointer,
    loss_gradient_pointer,
    out_pointer,
    partial_pointer,
    squares_pointer,
    tokens,
    neurons,
    program_tokens,
    delta,
    ACTIVATION: tl.constexpr,
    METHOD: tl.constexpr,
    BALANCED: tl.constexpr,
    SQUARES: tl.constexpr,
    BIASED: tl.constexpr,
    EVEN: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_NEURONS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    columns = tl.program_id(1) * TILE_NEURONS + tl.arange(0, TILE_NEURONS)
    inside = columns < neurons
    stored: tl.constexpr = out_pointer.dtype.element_ty
    if METHOD != "none":
        mean = tl.load(mean_pointer + columns, mask=inside, other=0.0)[None, :]
        root = _root(tl.load(threshold_pointer + columns, mask=inside, other=1.0)[None, :])
    if METHOD == "regularize":
        pull = 2.0 * tl.load(loss_gradient_pointer)
        if BALANCED:
            balance = tl.load(balance_pointer + columns, mask=inside, other=0.0)[None, :]
    bias = None
    if BIASED:
        bias = tl.load(bias_pointer + columns, mask=inside, other=0.0)[None, :]
        total = tl.zeros([TILE_TOKENS, TILE_NEURONS], tl.float32)
    if SQUARES:
        arrived = tl.zeros([TILE_TOKENS, TILE_NEURONS // VECTOR], tl.float32)
        directions = tl.zeros([TILE_TOKENS, TILE_NEURONS // VECTOR], tl.float32)
    first = tl.program_id(0) * program_tokens
    end = tl.minimum(first + program_tokens, tokens)
    last = end - TILE_TOKENS
    ahead = _load(pre_pointer, first, columns, last, tokens, neurons, EVEN, TILE_TOKENS)
    g_ahead = _load(gradient_pointer, first, columns, last, tokens, neurons, EVEN, TILE_TOKENS)
    for row in range(first, end, TILE_TOKENS):
        x, g = _biased(ahead, bias, stored), g_ahead.to(tl.float32)
        following = row + TILE_TOKENS
        ahead = _load(pre_pointer, following, columns, last, tokens, neurons, EVEN, TILE_TOKENS)
        g_ahead = _load(
            gradient_pointer, following, columns, last, tokens, neurons, EVEN, TILE_TOKENS
        )
        if SQUARES:
            arrived += _sum_of_squares(g, TILE_TOKENS, TILE_NEURONS, VECTOR)
        if METHOD != "none":
            # Rounded as the forward pass rounded it, so that the same activations are selected.
            d = _float(_rounded(_activate(x, ACTIVATION, stored), stored)) - mean
            selected = tl.abs(d) >= root
            if METHOD == "deactivate":
                g = tl.where(selected, -delta * g, g)
            else:
                direction = tl.where(selected, _reciprocal(d), 0.0)
                if BALANCED:
                    direction = tl.fma(-d, balance, direction)
                if SQUARES:
                    if not EVEN:
                        seen = _inside(row, columns, tokens, neurons, TILE_TOKENS)
                        direction = tl.where(seen, direction, 0.0)
                    directions += _sum_of_squares(direction, TILE_TOKENS, TILE_NEURONS, VECTOR)
                g = tl.fma(pull, direction, g)
        g *= _slope(x, ACTIVATION, stored)
        _store(out_pointer, _rounded(g, stored), row, columns, tokens, neurons, EVEN, TILE_TOKENS)
        if BIASED:
            if not EVEN:
                g = tl.where(_inside(row, columns, tokens, neurons, TILE_TOKENS), g, 0.0)
            total += g
    if BIASED:
        partial = partial_pointer + tl.program_id(0) * neurons
        tl.store(partial + columns, tl.sum(total, 0), mask=inside)
    if SQUARES:
        program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        tl.store(squares_pointer + 2 * program, tl.sum(arrived))
        tl.store(squares_pointer + 2 * program + 1, tl.sum(directions))


@triton.jit
def measure_kernel(
    pre_pointer,
    bias_pointer,
    mean_pointer,
    denominator_pointer,
    fourth_pointer,
    largest_pointer,
    counts_pointer,
    tokens,
    neurons,
    program_tokens,
    ACTIVATION: tl.constexpr,
    BIASED: tl.constexpr,
    EVEN: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_NEURONS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    columns = tl.program_id(1) * TILE_NEURONS + tl.arange(0, TILE_NEURONS)
    inside = columns < neurons
    stored: tl.constexpr = pre_pointer.dtype.element_ty
    mean = tl.load(mean_pointer + columns, mask=inside, other=0.0)[None, :]
    inverse = 1.0 / tl.load(denominator_pointer + columns, mask=inside, other=1.0)[None, :]
    bias = None
    if BIASED:
        bias = tl.load(bias_pointer + columns, mask=inside, other=0.0)[None, :]
    sum_fourth = tl.zeros([TILE_TOKENS, TILE_NEURONS], tl.float32)
    largest = tl.zeros([TILE_TOKENS, TILE_NEURONS], tl.float32)
    first = tl.program_id(0) * program_tokens
    end = tl.minimum(first + program_tokens, tokens)
    last = end - TILE_TOKENS
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    counts = counts_pointer + program * HISTOGRAM_BINS
    for row in range(first, end, TILE_TOKENS):
        x = _load(pre_pointer, row, columns, last, tokens, neurons, EVEN, TILE_TOKENS)
        x = _biased(x, bias, stored)
        d = _float(_rounded(_activate(x, ACTIVATION, stored), stored)) - mean
        square = d * d
        if not EVEN:
            seen = _inside(row, columns, tokens, neurons, TILE_TOKENS)
            square = tl.where(seen, square, 0.0)
        sum_fourth = tl.fma(square, square, sum_fourth)
        scale = square * inverse
        largest = tl.maximum(largest, scale)
        bins = (_log2(scale) - HISTOGRAM_LOWEST) * HISTOGRAM_BINS_PER_OCTAVE
        # Not a number counts as the least.
        bins = tl.where(bins > 0.0, tl.minimum(bins, HISTOGRAM_BINS - 1.0), 0.0).to(tl.int32)
        one = tl.full(bins.shape, 1, tl.int32)
        if EVEN:
            tl.atomic_add(counts + bins, one, sem="relaxed")
        else:
            tl.atomic_add(counts + bins, one, mask=seen, sem="relaxed")
    fourth = fourth_pointer + tl.program_id(0) * neurons
    tl.store(fourth + columns, tl.sum(sum_fourth, 0), mask=inside)
    tl.store(largest_pointer + program, tl.max(largest))


def forward(pre: Tensor, arguments: kernels.KernelArguments, sums: Tensor | None) -> Tensor:
    """`kernels.forward` in one pass over `pre`."""
    launch = Launch(pre, arguments)
    out = torch.empty_like(pre)
    partial = None
    if sums is not None:
        partial = launch.partial(3 * launch.neurons + launch.tiles)
    launch(
        forward_kernel,
        pre,
        launch.or_any(arguments.bias),
        arguments.mean,
        launch.or_any(arguments.threshold),
        out,
        launch.or_any(partial),
        METHOD=arguments.method,
        SELECTING=arguments.threshold is not None,
        SUMMING=sums is not None,
    )
    if sums is not None and partial is not None:
        total = partial.sum(0)
        sums[:-1] += total[: 3 * launch.neurons]
        sums[-1] += total[3 * launch.neurons :].sum()
    return out


def backward(
    grad: Tensor,
    pre: Tensor,
    arguments: kernels.KernelArguments,
    loss_gradient: Tensor | float,
    squares: Tensor | None = None,
) -> kernels.Gradients:
    """`kernels.backward` in one pass over `pre` and `grad`."""
    launch = Launch(pre, arguments, most_registers(comparing=squares is not None))
    out = torch.empty_like(pre)
    partial = None if arguments.bias is None else launch.partial(launch.neurons)
    squares_partial = None if squares is None else launch.partial(2 * launch.tiles)
    if not isinstance(loss_gradient, Tensor):
        loss_gradient = torch.full((), loss_gradient, dtype=torch.float32, device=pre.device)
    launch(
        backward_kernel,
        pre,
        launch.or_any(arguments.bias),
        grad.contiguous(),
        arguments.mean,
        launch.or_any(arguments.threshold),
        launch.or_any(arguments.balance),
        loss_gradient,
        out,
        launch.or_any(partial),
        launch.or_any(squares_partial),
        delta=arguments.delta,
        METHOD="none" if arguments.threshold is None else arguments.method,
        BALANCED=arguments.balance is not None,
        SQUARES=squares is not None,
    )
    if squares is not None and squares_partial is not None:
        squares += squares_partial.view(-1, 2).sum(0)
    return out, None if partial is None else partial.sum(0).to(pre.dtype)


def measure(
    pre: Tensor,
    arguments: kernels.KernelArguments,
    denominator: Tensor,
    fourth: Tensor,
    largest: Tensor,
    counts: Tensor,
) -> None:
    """`kernels.measure` in one pass over `pre`."""
    if len(pre) == 0:
        return
    launch = Launch(pre, arguments)
    fourth_partial = launch.partial(launch.neurons)
    largest_partial = launch.partial(launch.tiles)
    counts_partial = torch.zeros(
        launch.programs * launch.tiles, BINS, dtype=torch.int32, device=pre.device
    )
    launch(
        measure_kernel,
        pre,
        launch.or_any(arguments.bias),
        arguments.mean,
        denominator,
        fourth_partial,
        largest_partial,
        counts_partial,
    )
    fourth += fourth_partial.sum(0)
    torch.maximum(largest, largest_partial.max(), out=largest)
    counts += counts_partial.sum(0)


def tiles(element: int) -> dict[str, int]:
    """The tiles of activations of `element` bytes: 16 bytes a thread, a token a warp.

    The interpreter, which takes as long for a small tile as for a large one, gets larger ones.
    """
    vector = VECTOR_BYTES // element
    tokens = WARPS if COMPILED.value else 16 * WARPS
    return {"TILE_TOKENS": tokens, "TILE_NEURONS": 32 * vector, "VECTOR": vector}


class Launch:
    """One kernel's launch over [tokens, neurons]: every program takes some tokens of one tile.

    So many programs as run at once: no last wave leaves a GPU half idle.
    """

    def __init__(
        self, pre: Tensor, arguments: kernels.KernelArguments, registers: int = REGISTERS
    ) -> None:
        self.pre, self.arguments = pre, arguments
        self.options = {"maxnreg": registers} if COMPILED.value else {}
        self.tokens, self.neurons = pre.shape
        self.tile = tiles(pre.element_size())
        self.tiles = triton.cdiv(self.neurons, self.tile["TILE_NEURONS"])
        most = max(1, programs_at_once(pre.device, registers) // self.tiles)
        step = self.tile["TILE_TOKENS"]
        self.program_tokens = step * max(1, triton.cdiv(self.tokens, most * step))
        self.programs = triton.cdiv(self.tokens, self.program_tokens)
        self.even = self.tokens % step == 0 and self.neurons % self.tile["TILE_NEURONS"] == 0

    def partial(self, width: int) -> Tensor:
        """A row of sums a program, of those that take different tokens."""
        return torch.empty(self.programs, width, dtype=torch.float32, device=self.pre.device)

    def or_any(self, tensor: Tensor | None) -> Tensor:
        """A pointer that a variant of the kernel does not read must still point somewhere."""
        return self.arguments.mean if tensor is None else tensor

    def __call__(self, kernel, *tensors: Tensor, **constants) -> None:
        if self.programs == 0:  # no tokens
            return
        with torch.cuda.device_of(self.pre):  # Triton launches on the current GPU
            kernel[(self.programs, self.tiles)](
                *tensors,
                self.tokens,
                self.neurons,
                self.program_tokens,
                ACTIVATION=self.arguments.activation,
                BIASED=self.arguments.bias is not None,
                EVEN=self.even,
                **self.tile,
                num_warps=WARPS,
                **self.options,
                **constants,
            )


def most_registers(*, comparing: bool) -> int:
    """Of a thread; `comparing` gradients takes more."""
    return REGISTERS_COMPARING if comparing else REGISTERS


@cache
def programs_at_once(device: torch.device, registers: int) -> int:
    """As many as its multiprocessors run, each thread with so many registers."""
    if device.type != "cuda":
        return PROGRAMS_INTERPRETED
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return processors * (PROCESSOR_REGISTERS // (32 * WARPS * registers))
