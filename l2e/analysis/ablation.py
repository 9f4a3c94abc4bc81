"""Ablation: how much the loss on each feature rises without one neuron (MEmeL Fig. 2).

Small jobs run every neuron on every passage. Where that is too much, the neurons are ablated on a
sample of each feature's passages; on all of them one backward pass tells every neuron's rise to
first order, and the sample corrects what that lacks: a difference estimator, whose standard error
is reported.
"""

import math
from dataclasses import dataclass

import numpy as np

from l2e.analysis.ablated_runs import (
    LEAST_EXACT,
    SEED,
    Passages,
    Settings,
    ablate,
    activations_of,
    first_order,
)
from l2e.analysis.features import FeatureSet
from l2e.analysis.networks import Network, neuron_name

# Forward FLOPs of exact ablation that are done unasked: about five minutes on two CPU cores.
EXACT_FLOPS = {"cpu": 3e13, "cuda": 3e16}


@dataclass(frozen=True)
class Losses:
    """By feature, in nats a token: `base` [features] with nothing ablated; `rise` [neurons,
    features] without each neuron, and `stderr`, its standard error (0 where all is exact).

    exact: passages of each feature that were run exactly, None for all. correlation: of the
    first-order rise with the exact one, over those passages and neurons; None where all is exact.
    """

    base: np.ndarray
    rise: np.ndarray
    stderr: np.ndarray
    exact: int | None
    correlation: float | None


def analyze_ablation(
    network: Network,
    features: FeatureSet,
    neurons: list[tuple[int, int]],
    random_neurons: int,
    settings: Settings,
    progress: bool = True,
) -> dict:
    """The ablate verb's result: the rise of the loss per feature, in percent, for each neuron and
    for random neurons of the same layers.

    Raises ValueError for a neuron the model doesn't have.
    """
    for layer, neuron in neurons:
        if layer >= len(network.layers) or neuron >= network.neurons:
            raise ValueError(
                f"neuron {neuron_name(layer, neuron)}: {network.name} has {len(network.layers)} "
                f"layers of {network.neurons} neurons (counted from 0)"
            )
    random = np.random.default_rng(SEED)
    control = [
        (neurons[i % len(neurons)][0], int(random.integers(network.neurons)))
        for i in range(random_neurons)
    ]
    losses = ablation_losses(network, features, neurons + control, settings, progress)

    def by_feature(values: np.ndarray) -> dict[str, float]:
        return dict(zip(features.names, values.tolist(), strict=True))

    rows = [
        {
            "neuron": neuron_name(*name),
            "increase_percent": by_feature(100 * rise / losses.base),
            "increase_percent_stderr": by_feature(100 * stderr / losses.base),
        }
        for name, rise, stderr in zip(neurons + control, losses.rise, losses.stderr, strict=True)
    ]
    return {
        "how": settings.how,
        "precision": settings.precision,
        "exact_passages": losses.exact,
        "first_order_correlation": losses.correlation,
        "loss": by_feature(losses.base),
        "neurons": rows[: len(neurons)],
        "random": rows[len(neurons) :],
    }


def ablation_losses(
    network: Network,
    features: FeatureSet,
    neurons: list[tuple[int, int]],
    settings: Settings,
    progress: bool = True,
) -> Losses:
    """Mean next-token loss of each feature, and its rise without each neuron."""
    data = Passages(network, features, settings)
    pools = activations_of(network, data, neurons, settings)
    per_feature = settings.exact or _affordable(network, data, neurons)
    rows = data.sample(per_feature)
    base, linear = np.zeros(len(data)), np.zeros((len(neurons), len(data)))
    if len(rows) < len(data):
        base, linear = first_order(network, data, neurons, pools, settings, progress)
    exact = ablate(network, data, rows, neurons, pools, settings, progress)
    base[rows] = exact[0]
    rise = exact[1:] - exact[0]
    tokens = data.member @ data.counts
    mean, stderr = _estimate(data, linear, rise, rows)
    sampled = len(rows) < len(data)
    return Losses(
        base=data.member @ base / tokens,
        rise=mean,
        stderr=stderr,
        exact=per_feature if sampled else None,
        correlation=_correlation(linear[:, rows], rise) if sampled else None,
    )


def _estimate(
    data: Passages, linear: np.ndarray, rise: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rise in nats a token and its standard error, [neurons, features] each.

    linear: to first order, [neurons, passages]; rise: exact, [neurons, rows]; both are sums over a
    passage. Per feature, the mean of the first plus a ratio estimate of what the exact runs say it
    lacks.
    """
    mean = linear @ data.member.T / (data.member @ data.counts)
    stderr = np.zeros_like(mean)
    lacking = rise - linear[:, rows]
    for label in range(len(data.features.names)):
        among = data.features.labels[rows] == label
        tokens, found = data.counts[rows[among]], lacking[:, among]
        ratio = found.sum(axis=1) / tokens.sum()
        mean[:, label] += ratio
        chosen, all_of_it = among.sum(), data.member[label].sum()
        spread = ((found - np.outer(ratio, tokens)) ** 2).sum(axis=1) / max(1, chosen - 1)
        left_out = 1 - chosen / all_of_it
        stderr[:, label] = np.sqrt(left_out * chosen * spread) / tokens.sum()
    return mean, stderr


def _correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    """Pearson's, over all entries; None where one of them does not vary."""
    if one.std() == 0 or other.std() == 0:
        return None
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


def _affordable(network: Network, data: Passages, neurons: list[tuple[int, int]]) -> int | None:
    """Exact passages of each feature within EXACT_FLOPS; None where all of them are."""
    block = sum(parameter.numel() for parameter in network.layers[0].block.parameters())
    unembedding = sum(parameter.numel() for parameter in network.unembed.parameters())
    later = sum(len(network.layers) - 1 - layer for layer, _ in neurons)
    scored = int(data.counts.sum())
    work = 2 * (later * block * int(data.lengths.sum()) + len(neurons) * unembedding * scored)
    share = EXACT_FLOPS[network.device.type] / work
    if share >= 1:
        return None
    passages = max(LEAST_EXACT, math.floor(share * len(data) / len(data.features.names)))
    print(
        f"ablation: {len(neurons)} neurons on {len(data)} passages would be {work:.0e} FLOPs; "
        f"{passages} passages of each feature run exactly, the others to first order (see --exact)"
    )
    return passages
