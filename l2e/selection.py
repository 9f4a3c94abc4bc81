"""Which activations of one call are selected (L2E's threshold is one comparison; top k; chance)."""

import zlib

import torch
from torch import Tensor

from l2e import kernels, statistics
from l2e.kernels import KernelArguments
from l2e.state import LayerState
from l2e.statistics import Statistics


def select(
    state: LayerState, rows: Tensor, arguments: KernelArguments, sequence: int
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """What is compared with what in this call.

    Args:
        rows: [samples, neurons], before the non-linearity and the bias.
        sequence: rows of one sequence, for selections that run over whole sequences.

    Returns:
        The threshold or mask as `KernelArguments` takes it (None: nothing is selected); the mean
        to put in the place of selected activations, if not the running one; and the mask of
        selections that the backward pass does not compute again ([0] for the threshold).
    """
    if state.config.selection == "threshold":
        nothing = torch.empty(0, dtype=torch.bool, device=rows.device)
        return (state.threshold if state.selecting else None), None, nothing
    if not state.selecting:
        return None, None, torch.zeros(rows.shape, dtype=torch.bool, device=rows.device)
    if state.config.selection == "random":
        mask = by_chance(state, sequence, rows.device)
        mask = mask.repeat(rows.numel() // mask.numel(), 1).view(rows.shape)
        return mask, None, mask
    z = kernels.activate(arguments.biased(rows), arguments.activation).float()
    mean, denominator, updated_mean = state.mean, state.denominator, None
    if state.config.memel_code_compat:
        scored = _updated(state, z)
        mean = updated_mean = scored.mean
        denominator = scored.var + state.config.eps * scored.var.mean()
    scale = (z - mean).square_().div_(denominator.clamp(min=torch.finfo(torch.float32).tiny))
    mask = _largest(state, scale, sequence if state.config.memel_code_compat else 1)
    return mask, updated_mean, mask


def by_chance(state: LayerState, sequence: int, device: torch.device) -> Tensor:
    """[sequence, units]: what chance selects in this step, in every sequence the same.

    By a hash of layer, step, position and neuron, so that every layout and every recomputation
    selects alike.
    """
    layer = zlib.crc32(state.name.encode())
    first = state.sharding.tensor_rank * state.units
    positions = torch.arange(sequence, device=device)[:, None]
    neurons = torch.arange(first, first + state.units, device=device)
    seed = _mixed(torch.tensor(layer ^ state.phase.step, device=device))
    drawn = _mixed(_mixed(seed ^ positions) ^ neurons)
    return drawn.float() < state.config.inhibit_fraction * 2**32


def _mixed(value: Tensor) -> Tensor:
    """32 bits that look unlike those of `value` (int64): multiply and fold, twice."""
    for factor in (0x2C1B3C6D, 0x297A2D39):
        value = (value ^ (value >> 15)) * factor & 0xFFFFFFFF
    return value ^ (value >> 15)


def _largest(state: LayerState, scale: Tensor, rows_per_sample: int) -> Tensor:
    """[samples, neurons] -> mask of the k largest of each sample, over all shards."""
    samples = scale.reshape(len(scale) // rows_per_sample, -1)
    k = min(state.config.topk, samples.shape[1])
    candidates = state.sharding.gather_neurons(samples.topk(k, dim=1).values)
    smallest = candidates.topk(min(state.config.topk, candidates.shape[1]), dim=1).values[:, -1:]
    return ((samples >= smallest) & (samples > 0)).view(scale.shape)


def _updated(state: LayerState, z: Tensor) -> Statistics:
    """The statistics as MEmeL's code scores by: this call's batch already merged."""
    deviation = z - state.mean
    count = torch.tensor(float(len(z)), dtype=torch.float32, device=z.device)
    return statistics.merge(
        state.statistics,
        count,
        deviation.sum(0),
        deviation.square().sum(0),
        state.config.forget_step,
        first_twice=True,
    )
