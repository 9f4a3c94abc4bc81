"""The arithmetic on activations: what one forward and one backward pass of a layer compute.

Everything here is local and stateless: [rows, neurons] in, [rows, neurons] and column sums out.
Rows are worked on in slices, so no temporary is as large as the input.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from l2e.threshold import histogram

try:
    import numpy
except ImportError:  # torch alone is asked for
    numpy = None  # type: ignore[assignment]

# Entries of a slice: its temporaries stay in a CPU's cache; on a GPU they are small beside a layer.
SLICE_ENTRIES = {"cpu": 2**16, "cuda": 2**24}
TINY = torch.finfo(torch.float32).tiny
APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}
# To the pre-activations, [rows, neurons], and to the bias, [neurons] (None: there is none).
Gradients = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class KernelArguments:
    """What is done to a layer's activations, frozen while one optimizer step runs.

    Attributes:
        activation: "gelu", "gelu_tanh", or None for the identity.
        bias: [neurons], added before the activation; None where a linear layer has added its own.
        method, delta: as in the configuration.
        mean: [neurons], float32.
        threshold: [neurons], the (z - mean)^2 from which on an activation is selected, or a mask
            [rows, neurons] of what is selected; None while nothing is.
        balance: [neurons], running share of selected activations over variance, for the
            scale-invariant L_MS; None otherwise.
        replacement: [neurons], the value of a deactivated activation where it is not `mean`.
        least: [neurons], the (z - mean)^2 below which L_MS is quadratic, where a mask may select
            entries at the mean itself; None where what is selected is far from it.
    """

    activation: str | None
    method: str
    delta: float
    mean: Tensor
    threshold: Tensor | None
    balance: Tensor | None = None
    replacement: Tensor | None = None
    bias: Tensor | None = None
    least: Tensor | None = None

    @property
    def substitute(self) -> Tensor:
        """[neurons], the values that deactivated activations get."""
        return self.mean if self.replacement is None else self.replacement

    def biased(self, pre: Tensor) -> Tensor:
        """What the activation is applied to, rounded as `pre` is."""
        return pre if self.bias is None else pre + self.bias


def forward(pre: Tensor, arguments: KernelArguments, sums: Tensor | None) -> Tensor:
    """The activations as the next layer sees them, [rows, neurons] in the dtype of `pre`.

    Args:
        pre: [rows, neurons].
        sums: float32 [3, neurons] and one more entry for the loss, flat: the sums over rows of
            z - mean, of (z - mean)^2, of selected entries, and the sum over selected entries of
            log (z - mean)^2 are added to it. None in a recomputation: its samples were counted.
    """
    out = torch.empty_like(pre)
    for rows in slices(pre):
        z = activate(arguments.biased(pre[rows]), arguments.activation, out[rows])
        if sums is None and arguments.method in ("none", "regularize"):
            continue
        deviation = z.float() - arguments.mean
        square = deviation * deviation
        selected = _selected(square, arguments, rows)
        if sums is not None:
            _add_sums(sums, deviation, square, selected, arguments)
        if arguments.method == "deactivate" and selected is not None:
            out[rows] = torch.where(selected > 0, arguments.substitute.to(z.dtype), z)
        elif arguments.method == "silence":
            z.zero_()
    return out


def observe(
    pre: Tensor, arguments: KernelArguments, sums: Tensor | None
) -> tuple[Tensor, Tensor, float]:
    """The sums that `forward` adds, and what it selects, of activations that stay as they are.

    Its cost beside the sums is that of the selected entries; but a GPU's host waits for it.

    Args:
        pre, sums: as of `forward`.

    Returns:
        Of each selected entry, unless the method is "none", its number in `pre` (int32), and what
        the method needs there: half of d log (z - mean)^2 / dz (float32), or for "deactivate" the
        new value (in the dtype of `pre`). And the sum of their log (z - mean)^2, where it is added.
    """
    neurons = pre.shape[1]
    finds = arguments.method != "none" and arguments.threshold is not None
    counts = arguments.method == "none" and arguments.threshold is not None
    found: list[tuple[Tensor, Tensor]] = []
    # Reused, since memory that is new to the process costs more than the arithmetic.
    buffers = arguments.mean.new_empty(2 + counts, len(pre[next(slices(pre))]), neurons)
    for rows in slices(pre):
        z = activate(arguments.biased(pre[rows]), arguments.activation).float()
        parts = buffers[:, : len(z)]
        deviation, square, *selected = parts
        torch.sub(z, arguments.mean, out=deviation)
        torch.mul(deviation, deviation, out=square)
        if counts:
            _selected(square, arguments, rows, out=selected[0])
        if sums is not None:
            sums[: len(parts) * neurons].view(-1, neurons).add_(parts.sum(1))
        if finds:
            entries = _numbers(square, arguments, rows)
            found.append((entries + rows.start * neurons, deviation.view(-1)[entries]))
    if finds and sums is not None:
        columns = torch.cat([entries for entries, _ in found]) % neurons
        sums[:-1].view(3, -1)[2].add_(torch.bincount(columns, minlength=neurons))
    if not found:
        empty = arguments.mean.new_empty(0)
        return empty.int(), empty.to(pre.dtype), 0.0
    entries, deviations = (torch.cat(parts) for parts in zip(*found, strict=True))
    if arguments.method == "deactivate":
        return entries.int(), arguments.substitute[entries % neurons].to(pre.dtype), 0.0
    squares = deviations * deviations
    least = None if arguments.least is None else arguments.least[entries % neurons]
    directions = deviations.div_(squares.clamp(min=TINY if least is None else least))
    loss = _log(squares, least).sum()
    if sums is not None:
        sums[-1].add_(loss)
    return entries.int(), directions, float(loss)


def _numbers(square: Tensor, arguments: KernelArguments, rows: slice) -> Tensor:
    """The numbers (int64) of the selected entries of some rows.

    By NumPy, where it is installed, which compares and finds several times as fast: of the few
    bytes of eight entries that have any, which entries they are.
    """
    threshold = arguments.threshold
    assert threshold is not None
    if numpy is None:
        selected = threshold[rows] if threshold.dtype == torch.bool else square >= threshold
        return selected.flatten().nonzero().view(-1)
    if threshold.dtype == torch.bool:
        bits = numpy.packbits(threshold[rows].numpy(), bitorder="little")
    else:
        bits = numpy.packbits(square.numpy() >= threshold.numpy(), bitorder="little")
    octets = numpy.flatnonzero(bits != 0)
    inside = numpy.flatnonzero(numpy.unpackbits(bits[octets], bitorder="little").view(bool))
    return torch.from_numpy(octets[inside >> 3] * 8 + (inside & 7))


def backward(
    grad: Tensor,
    pre: Tensor,
    arguments: KernelArguments,
    loss_gradient: Tensor | float,
    squares: Tensor | None = None,
) -> Gradients:
    """Gradients to `pre`, [rows, neurons], and to the bias, [neurons] (None: there is none).

    Nothing but `pre` was kept: the activations and what is selected are computed again.

    Args:
        grad: [rows, neurons], the gradient to the forward's result.
        loss_gradient: factor of d(sum of log (z - mean)^2)/dz, for `regularize`.
        squares: [2], float32: the sums of squares of `grad` and of half that derivative are added
            to it.
    """
    out = torch.empty_like(pre)
    bias_sum = None if arguments.bias is None else torch.zeros_like(arguments.mean)
    for rows in slices(pre):
        biased = arguments.biased(pre[rows])
        grad_z = _activation_gradient(grad[rows], biased, arguments, rows, loss_gradient, squares)
        to_pre = activation_backward(grad_z, biased, arguments.activation, out[rows])
        if bias_sum is not None:
            bias_sum += to_pre.sum(0, dtype=torch.float32)
    return out, None if bias_sum is None else bias_sum.to(pre.dtype)


def correct(
    to_pre: Tensor,
    grad: Tensor,
    pre: Tensor,
    activation: str,
    entries: Tensor,
    values: Tensor | None,
    *,
    scale: float = 1.0,
    factor: float = 0.0,
) -> None:
    """Write into the activation's gradient `to_pre` that of the selected entries.

    The gradient that arrives there is taken `scale` times, with `factor` times `values` added.

    Args:
        to_pre, grad, pre: [...], of one shape: the gradient to the activation's input, the one to
            its output, and the input.
        entries, values: of the selected entries, as `observe` gives them; None: no value is added.
    """
    entries, wide = entries.long(), torch.promote_types(pre.dtype, torch.float32)
    to_z = grad.take(entries).to(wide) * scale
    if values is not None:
        to_z.add_(values, alpha=factor)
    selected = pre.take(entries).to(wide)
    activation_backward(to_z, selected, activation, selected)
    to_pre.put_(entries, selected.to(to_pre.dtype))


def measure(
    pre: Tensor,
    arguments: KernelArguments,
    denominator: Tensor,
    fourth: Tensor,
    largest: Tensor,
    counts: Tensor,
) -> None:
    """What is only logged, and what tau starts from; added to the last three arguments.

    Args:
        denominator: [neurons], of the Monosemantic Scale.
        fourth: [neurons], sums over rows of (z - mean)^4.
        largest: [], the largest MS.
        counts: int64 [threshold.BINS], the histogram of the MS.
    """
    for rows in slices(pre):
        z = activate(arguments.biased(pre[rows]), arguments.activation).float()
        square = (z - arguments.mean).square_()
        fourth.add_((square * square).sum(0))
        scale = square.div_(denominator)
        torch.maximum(largest, scale.max(), out=largest)
        counts.add_(histogram(scale))


def _activation_gradient(
    grad: Tensor,
    biased: Tensor,
    arguments: KernelArguments,
    rows: slice,
    loss_gradient: Tensor | float,
    squares: Tensor | None,
) -> Tensor:
    """Gradient to the activations z of some rows from that to the forward's result."""
    if squares is not None:
        squares[0] += grad.float().square().sum()
    if arguments.method == "silence":
        return torch.zeros_like(grad)
    if arguments.method == "none" or arguments.threshold is None:
        return grad
    deviation = activate(biased, arguments.activation).float() - arguments.mean
    square = deviation * deviation
    selected = _selected(square, arguments, rows)
    assert selected is not None
    if arguments.method == "deactivate":
        return torch.where(selected > 0, -arguments.delta * grad, grad)
    square.clamp_(min=TINY if arguments.least is None else arguments.least)
    direction = selected.mul_(deviation).div_(square)
    if arguments.balance is not None:
        direction.sub_(deviation.mul_(arguments.balance))
    if squares is not None:
        squares[1] += direction.square().sum()
    return (grad + direction.mul_(2 * loss_gradient)).to(grad.dtype)


def activate(pre: Tensor, activation: str | None, out: Tensor | None = None) -> Tensor:
    """The activations of `pre`, in `out` if that is given."""
    if activation is None:
        return pre if out is None else out.copy_(pre)
    if out is None:
        return F.gelu(pre, approximate=APPROXIMATE[activation])
    return torch.ops.aten.gelu.out(pre, approximate=APPROXIMATE[activation], out=out)


def activation_backward(grad: Tensor, pre: Tensor, activation: str | None, out: Tensor) -> Tensor:
    """The gradient to `pre`, in `out`."""
    if activation is None:
        return out.copy_(grad)
    gelu_backward = torch.ops.aten.gelu_backward.grad_input
    return gelu_backward(grad, pre, approximate=APPROXIMATE[activation], grad_input=out)


def slices(pre: Tensor) -> Iterator[slice]:
    """Slices of rows: no temporary is as large as `pre`."""
    rows = rows_of_slice(pre)
    return (slice(start, start + rows) for start in range(0, len(pre), rows))


def rows_of_slice(pre: Tensor) -> int:
    return max(1, SLICE_ENTRIES["cuda" if pre.is_cuda else "cpu"] // pre.shape[1])


def _selected(
    square: Tensor, arguments: KernelArguments, rows: slice, out: Tensor | None = None
) -> Tensor | None:
    """1 where an entry of some rows is selected and 0 elsewhere; None while nothing is.

    In float32: a CPU compares into floats and multiplies by them six times as fast as it compares
    into booleans and chooses by them.
    """
    if arguments.threshold is None:
        return None
    out = torch.empty_like(square) if out is None else out
    if arguments.threshold.dtype == torch.bool:
        return out.copy_(arguments.threshold[rows])
    return torch.ge(square, arguments.threshold, out=out)


def _add_sums(
    sums: Tensor,
    deviation: Tensor,
    square: Tensor,
    selected: Tensor | None,
    arguments: KernelArguments,
) -> None:
    columns = sums[:-1].view(3, -1)
    columns[0].add_(deviation.sum(0))
    columns[1].add_(square.sum(0))
    if selected is not None:
        columns[2].add_(selected.sum(0))
        if arguments.method == "regularize":
            # Not square[selected]: a GPU would have to tell the host how many there are.
            sums[-1].add_(_log(square, arguments.least).mul_(selected).sum())


def _log(square: Tensor, least: Tensor | None) -> Tensor:
    """log of (z - mean)^2, and below `least` the quadratic with the same value and slope there."""
    if least is None:
        return square.clamp_(min=TINY).log_()
    return torch.where(square < least, least.log() + square / least - 1, square.log())
