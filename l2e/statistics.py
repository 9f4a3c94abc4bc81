"""Online mean and variance of every neuron, merged once an optimizer step.

Sums are taken around the running mean, never around zero, and the mean is kept in two float32
words, so that a mean of 10,000 beside a standard deviation of 1 costs no accuracy.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Statistics(NamedTuple):
    """Running statistics of one layer, or of several, stacked ([layers, ...]); all float32.

    Attributes:
        mean: [neurons], the running mean, and the centre that new sums are taken around.
        mean_low: [neurons], what float32 rounding left out of `mean`.
        var: [neurons], running sample variance.
        samples: [], the number m of samples they stand for.
    """

    mean: Tensor
    mean_low: Tensor
    var: Tensor
    samples: Tensor


def merge(
    old: Statistics,
    count: Tensor,
    deviation: Tensor,
    square: Tensor,
    forget_step: int,
    first_twice: bool = False,
) -> Statistics:
    """The statistics with one more batch (MEmeL, Lemma 3.2, with its forgetting).

    Of one layer, or of several, stacked.

    Args:
        count: [], the batch's samples b (0 changes nothing).
        deviation: [neurons], sum over the batch of z - old.mean.
        square: [neurons], sum over the batch of (z - old.mean)^2.
        forget_step: n_f; the old samples' weight is at most n_f batches'.
        first_twice: the mean counts one batch too many as old, as MEmeL's code does.
    """
    samples = torch.minimum(old.samples, forget_step * count.clamp(min=1))
    b, m = count.clamp(min=1)[..., None], samples[..., None]
    shift = deviation / b  # batch mean - old.mean
    v = (square / b - shift * shift).clamp(min=0)
    step = shift - old.mean_low  # batch mean - running mean, to both words

    spread = m * b / ((m + b) * (m + b - 1).clamp(min=1))
    var = spread * step * step + (b * v + (m - 1).clamp(min=0) * old.var) / (m + b - 1).clamp(min=1)
    old_weight = torch.where(m > 0, torch.minimum(m + b, forget_step * b), m) if first_twice else m
    offset = old.mean_low + step * (b / (old_weight + b))
    mean = old.mean + offset
    new = Statistics(
        mean=mean,
        mean_low=offset - (mean - old.mean),
        var=var,
        samples=torch.minimum(m + b, forget_step * b)[..., 0],
    )
    return where(count > 0, new, old)


def where(condition: Tensor, yes: Statistics, no: Statistics) -> Statistics:
    """A layer's from `yes` where `condition` [] is true, else from `no`."""
    of_neurons = condition[..., None]
    return Statistics(
        mean=torch.where(of_neurons, yes.mean, no.mean),
        mean_low=torch.where(of_neurons, yes.mean_low, no.mean_low),
        var=torch.where(of_neurons, yes.var, no.var),
        samples=torch.where(condition, yes.samples, no.samples),
    )


def recentre(
    count: Tensor, deviation: Tensor, square: Tensor, move: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums around another centre: `move` [neurons] is the old centre minus the new one."""
    return deviation + count * move, square + 2 * move * deviation + count * move * move
