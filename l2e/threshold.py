"""The moving threshold tau of a layer: selected are the activations with MS of tau or more.

tau starts at a quantile of one observed step, read from a histogram of integer counts, and then
follows the share of selected activations with one scalar update a step (L2E, section 4).
"""

import torch
from torch import Tensor

BINS_PER_OCTAVE = 32
LOWEST, HIGHEST = -20, 20  # log2 of the MS; what lies outside falls into the first or last bin
BINS = (HIGHEST - LOWEST) * BINS_PER_OCTAVE
MAX_STEP = 0.5


def histogram(scale: Tensor) -> Tensor:
    """Counts [BINS] (int64) of log2 of the MS `scale` (any shape), in bins of 1/32."""
    bins = ((torch.log2(scale) - LOWEST) * BINS_PER_OCTAVE).clamp(0, BINS - 1)
    bins = torch.nan_to_num(bins).long().flatten()
    return torch.zeros(BINS, dtype=torch.int64, device=scale.device).scatter_add_(
        0, bins, torch.ones_like(bins)
    )


def bin_edges() -> Tensor:
    """[BINS + 1], the MS at the histogram's bin edges."""
    return 2.0 ** (LOWEST + torch.arange(BINS + 1, dtype=torch.float64) / BINS_PER_OCTAVE)


def quantile(counts: Tensor, fraction: float) -> Tensor:
    """The MS (float32, [...]) that `fraction` of the entries counted in [..., BINS] reach.

    It is its bin's centre.
    """
    reached = counts.flip(-1).cumsum(-1).double()
    from_top = (reached < fraction * reached[..., -1:]).sum(-1)
    return torch.exp2(LOWEST + (BINS - 0.5 - from_top.float()) / BINS_PER_OCTAVE)


def step_size(updates: Tensor, rate: float, floor: float) -> Tensor:
    """eta after `updates` updates: rate / sqrt(1 + updates), at least the floor."""
    return (rate * torch.rsqrt(1 + updates)).clamp(min=floor)


def update(
    tau: Tensor, drift: Tensor, selected_fraction: Tensor, target: float, eta: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of log tau towards the target share, at most 0.5 either way, and of its drift.

    The error (f - k) / k moves log tau by eta, and `drift`, what it moves by in every step, by
    eta^2/4: a damped oscillator wherever log f falls at least as fast as log tau rises
    (docs/method.md).
    """
    move = (eta * (selected_fraction - target) / target).clamp(-MAX_STEP, MAX_STEP)
    drift = drift + eta / 4 * move
    return tau * torch.exp(move + drift), drift


def follow(tau: Tensor, expected_mean_ms: Tensor, mean_ms: Tensor) -> Tensor:
    """tau as far from the mean, in units of the activations' own scale, as it was a step ago.

    Where the scale drifts by r a step (in log units), `update` alone lags by r/eta. With this it
    has only one step's drift to make up for, once (docs/method.md).
    """
    return _grown(tau, mean_ms / expected_mean_ms)


def carry(tau: Tensor, old_mean_var: Tensor, new_mean_var: Tensor) -> Tensor:
    """tau for MS in units of the merged variance, at the same distance from the mean as before.

    MS is measured in units of the running variance. While that still follows a jump of the
    activations' scale, tau would have to chase it, and the update's small last step size is too
    slow: without this, the share is a third off 200 steps after the scale fell to a quarter.
    """
    return _grown(tau, old_mean_var / new_mean_var)


def _grown(tau: Tensor, growth: Tensor) -> Tensor:
    """tau times its growth, where that is known."""
    return torch.where((growth > 0) & (growth < torch.inf), tau * growth, tau)


def share_weight(updates: Tensor, forget_step: int) -> Tensor:
    """Weight of the newest batch in a running share, forgetting as the statistics do."""
    return 1 / (updates + 1).clamp(max=forget_step + 1)
