"""The end of an optimizer step, for all layers of one width: functions of stacked tensors.

On a GPU each is compiled into a few kernels, as many for 32 layers as for two; on a CPU, and where
that fails, they run as they are written.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from l2e import statistics, threshold
from l2e.config import L2EConfig
from l2e.problems import first_line
from l2e.stack import Derived, Flags, Metrics, Running
from l2e.statistics import Statistics

Sums = dict[str, Tensor]
Variant = tuple[Callable, bool]  # a function, and whether its step is measured: a graph each
Result = TypeVar("Result")
Fields = TypeVar("Fields", Running, Metrics, Statistics)
agreed: set[Variant] = set()  # with their plain form, when first used
not_compiled: set[Callable] = set()


class Shape(NamedTuple):
    """Of a stack's layers: neurons of the whole layer, and how its shards are divided.

    Attributes:
        total_neurons: of a layer, of all shards.
        expected_selected: for each sample, in all inhibited layers: what L_MS is divided by.
        tensor_size, tensor_rank: the shards, and which of them this is.
    """

    total_neurons: int
    expected_selected: float
    tensor_size: int
    tensor_rank: int


class Merged(NamedTuple):
    """What a step ends with.

    Attributes:
        usable: [layers] bool, whether there were samples, all of them finite.
        starts: [layers] bool, whether the step is the layer's start.
        ms_loss: [], L_MS of these layers.
    """

    running: Running
    derived: Derived
    metrics: Metrics
    usable: Tensor
    starts: Tensor
    ms_loss: Tensor


def merge(
    old: Running,
    denominator: Tensor,
    sums: Sums,
    measured: Sums | None,
    config: L2EConfig,
    shape: Shape,
) -> tuple[Statistics, Sums]:
    """The statistics with the global batch, and what only sums over a layer's shards tell.

    The latter is this shard's part, each [layers, ...]. A NaN or Inf anywhere makes the sum of
    variances one too, so every shard learns of it.
    """
    samples, square = sums["samples"], sums["square"]
    new = statistics.merge(
        old.statistics,
        samples[:, 0],
        sums["deviation"],
        square,
        config.forget_step,
        first_twice=config.memel_code_compat,
    )
    totals = {
        "var": new.var.sum(1),
        "selected": sums["selected"].sum(1),
        "log_square": sums["log_square"][:, 0],
        "scale": (square / denominator).sum(1),
        "gradient_squares": sums["gradient_squares"],
    }
    if measured is not None:
        kurtosis = samples * measured["fourth"] / square.square()
        totals["largest"] = _in_own_slot(measured["largest"].amax(1, keepdim=True), shape)
        totals["kurtosis"] = _in_own_slot(kurtosis, shape)
    return new, totals


def _in_own_slot(values: Tensor, shape: Shape) -> Tensor:
    """[layers, n] -> [layers, tensor ranks * n], zero but for this rank's: its sum over ranks is a
    gathering."""
    slots = torch.zeros_like(values).repeat(1, shape.tensor_size)
    width = values.shape[1]
    slots[:, shape.tensor_rank * width :][:, :width] = values
    return slots


def advance(
    old: Running,
    metrics: Metrics,
    weight: Tensor,
    start: Tensor,
    new: Statistics,
    sums: Sums,
    totals: Sums,
    squares: Tensor | None,
    flags: Flags,
    config: L2EConfig,
    shape: Shape,
) -> Merged:
    """The state of the next step: the merged statistics, unless an activation was NaN or Inf; tau,
    the shares and what is logged.

    Args:
        weight: [layers], of L_MS in this step.
        start: [layers], the tau of layers that are observing.
        new, totals: what `merge` gave, the latter summed over the shards.
        squares: [layers, 2], sums of squares of MLP output and residual stream; None in a step
            that is not measured.
    """
    samples, var = sums["samples"][:, 0], totals["var"]
    finite = var < torch.inf  # and a number
    usable = finite & (samples > 0)
    entries = samples.clamp(min=1) * shape.total_neurons
    selected_fraction, mean_ms = totals["selected"] / entries, totals["scale"] / entries

    mean_var = torch.where(finite, var / shape.total_neurons, old.mean_var)
    scored_by = mean_var if config.selection == "topk" else old.mean_var
    starts = usable & flags.may_start & (scored_by > 0)  # of constants there is no MS

    running = _follow(old, sums, selected_fraction, mean_ms, usable & flags.selecting, config)
    tau = torch.where(starts & flags.observing, start, running.tau)
    metrics = replaced(metrics, selected_fraction=selected_fraction, weight=weight)
    ms_loss = samples.new_zeros(())
    if config.method == "regularize":
        factor = (weight if config.weight is None else config.weight) / shape.expected_selected
        ms_loss = (factor * totals["log_square"] / samples.clamp(min=1)).sum()
        gradients = (totals["gradient_squares"] / entries[:, None]).sqrt()
        arrived, added, _ = gradients.unbind(1)
        ratio = torch.where(flags.comparing, added / arrived, metrics.gradient_ratio)
        metrics = replaced(metrics, gradient_ratio=ratio)
        if config.gradient_ratio is not None:
            comparing = usable & flags.comparing
            running = _compare(running, gradients, weight, comparing, config, shape)
    if squares is not None:
        metrics = _measured(metrics, totals, mean_ms, squares, flags.measuring)
    mean_ms = torch.where(usable, mean_ms, old.mean_ms)
    first_centre_only = old.samples == 0  # is no statistic
    centre = torch.where(first_centre_only[:, None], 0, old.mean)
    merged = statistics.where(finite, new, replaced(old.statistics, mean=centre))
    running = replaced(
        running,
        **merged._asdict(),
        tau=threshold.carry(tau, old.mean_var, mean_var),
        mean_ms=threshold.carry(mean_ms, old.mean_var, mean_var),
        mean_var=mean_var,
        std_at_start=torch.where(starts, mean_var.sqrt(), old.std_at_start),
        bad_age=torch.where(old.bad_age >= 0, old.bad_age + 1, torch.where(finite, -1, 0)),
    )
    return Merged(running, Derived.of(running, config), metrics, usable, starts, ms_loss)


def _follow(
    old: Running,
    sums: Sums,
    selected_fraction: Tensor,
    mean_ms: Tensor,
    moving: Tensor,
    config: L2EConfig,
) -> Running:
    """tau and the neurons' running shares of the layers that are `moving`, a selecting step on."""
    tau, drift = old.tau, old.drift
    if config.selection != "topk":
        eta = threshold.step_size(old.updates, config.threshold_rate, config.threshold_rate_floor)
        tau, drift = threshold.update(tau, drift, selected_fraction, config.inhibit_fraction, eta)
        tau = threshold.follow(tau, old.mean_ms, mean_ms)
    share = sums["selected"] / sums["samples"].clamp(min=1)
    weight = threshold.share_weight(old.updates, config.forget_step)[:, None]
    return replaced(
        old,
        tau=torch.where(moving, tau, old.tau),
        drift=torch.where(moving, drift, old.drift),
        share=torch.where(moving[:, None], torch.lerp(old.share, share, weight), old.share),
        updates=old.updates + moving,
    )


def _compare(
    old: Running,
    gradients: Tensor,
    weight: Tensor,
    comparing: Tensor,
    config: L2EConfig,
    shape: Shape,
) -> Running:
    """The running sizes of L_MS's gradient and of the one that arrives, a step on.

    Args:
        gradients: [layers, 3], root mean squares of the gradient that arrived, of the one that
            L_MS added, and of that without its factor.
    """
    arrived, added, direction = gradients.unbind(1)
    # Whatever scaled the losses, and averages over micro-batches and ranks, scaled both.
    ms_gradient = direction / shape.expected_selected
    lm_gradient = weight * ms_gradient / (added / arrived)
    usable = comparing & (lm_gradient > 0) & torch.isfinite(lm_gradient) & torch.isfinite(arrived)
    newest = threshold.share_weight(old.ratio_updates, config.forget_step)

    def moved(mean: Tensor, value: Tensor) -> Tensor:
        return torch.where(usable, torch.lerp(mean, value, newest), mean)

    return replaced(
        old,
        lm_gradient=moved(old.lm_gradient, lm_gradient),
        ms_gradient=moved(old.ms_gradient, ms_gradient),
        ratio_updates=old.ratio_updates + usable,
    )


def _measured(
    old: Metrics, totals: Sums, mean_ms: Tensor, squares: Tensor, measuring: Tensor
) -> Metrics:
    output, residual = squares.unbind(1)
    new = {
        "mean_ms": mean_ms,
        "max_ms": totals["largest"].amax(1),
        "mlp_to_residual": (output / residual).sqrt(),
    }
    before = old._asdict()
    new = {name: torch.where(measuring, value, before[name]) for name, value in new.items()}
    kurtosis = torch.where(measuring[:, None], totals["kurtosis"], old.kurtosis)
    return replaced(old, **new, kurtosis=kurtosis)


def replaced(old: Fields, **new: Tensor) -> Fields:
    """`old._replace(**new)`, of which torch.compile makes an empty tuple in PyTorch 2.11."""
    return type(old)(**(old._asdict() | new))


def run(
    device: torch.device, config: L2EConfig, function: Callable[..., Result], *arguments: Any
) -> Result:
    """One of the functions above, compiled on a GPU unless `kernels` is "plain".

    A compiled function is held against the plain one when it is first used, measured or not.
    """
    if config.kernels == "plain" or not compiles(device) or function in not_compiled:
        return function(*arguments)
    variant = function, all(argument is not None for argument in arguments)
    try:
        result = compiled(function)(*arguments)
        problem = None if variant in agreed else difference(result, function(*arguments))
    except Exception as error:  # a compiler may fail in any way; training goes on without it
        problem = f"{type(error).__name__}: {first_line(error)}"
    if problem is None:
        agreed.add(variant)
        return result
    not_compiled.add(function)
    logging.getLogger("l2e").warning(
        "l2e: the statistics are merged by plain operations, whose launches cost time: "
        "torch.compile failed: %s",
        problem,
    )
    return function(*arguments)


def difference(found: Any, expected: Any) -> str | None:
    """How two results differ, if by more than rounding; they are waited for."""
    tensors, structure = tree_flatten(found)
    wanted, wanted_structure = tree_flatten(expected)
    if structure != wanted_structure:
        return f"it returns {structure}"
    for one, other in zip(tensors, wanted, strict=True):
        if not torch.allclose(one, other, rtol=1e-4, atol=1e-6, equal_nan=True):
            return f"it differs by up to {(one - other).abs().max().item()}"
    return None


def compiles(device: torch.device) -> bool:
    """A CPU gains nothing: it has no launches."""
    return device.type == "cuda"


@cache
def compiled(function: Callable[..., Result]) -> Callable[..., Result]:
    """Each sum over neurons is one kernel: dividing sums that short costs a launch more."""
    return torch.compile(function, dynamic=False, options={"split_reductions": False})
