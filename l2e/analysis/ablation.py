"""Ablation: how much the loss on each feature rises without one neuron (MEmeL Fig. 2).

Small jobs run every neuron on every passage. Where that is too much, the neurons are ablated on a
sample of each feature's passages; on all of them one backward pass tells every neuron's rise to
first order, and the sample corrects what that lacks: a difference estimator, whose standard error
is reported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from l2e.analysis.analysis import Analysis, Options, option
from l2e.analysis.figures import Panel, Panels
from l2e.analysis.kinds import PROBED_KIND
from l2e.analysis.neurons import neuron_name, parse_neuron
from l2e.analysis.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from l2e.analysis.ablated_runs import Passages
    from l2e.analysis.features import FeatureSet
    from l2e.analysis.networks import Network
    from l2e.analysis.probing import Probe
    from l2e.analysis.subject import Subject

SEED = 42
PROBED = 10  # neurons that are ablated where none are named
MAX_TOKENS = 128  # of a passage
LEAST_EXACT = 2  # passages of a feature, for a standard error
# Forward FLOPs of exact ablation that are done unasked: about five minutes on two CPU cores.
EXACT_FLOPS = {"cpu": 3e13, "cuda": 3e16}


@dataclass(frozen=True)
class AblationOptions(Options):
    neurons: str | None = option(
        None, f"such as L3.N609,L4.N482 (default: the {PROBED} that probe best)", of=str
    )
    random: int = option(10, "random neurons", least=0)
    how: str = option(
        "mean",
        "what replaces the activation: its mean over the passages, 0, or its value at a random "
        "other token",
        choices=("mean", "zero", "resample"),
    )
    ablate_passages: int = option(50, "of each feature", least=1)
    scored: int | None = option(
        None, "random next tokens scored of each passage (default: all)", of=int, least=1
    )
    exact: int | None = option(
        None,
        "passages of each feature that are run exactly, at least 2; the others enter to first "
        "order, corrected by these, with a standard error (default: all, or as many as take "
        "minutes)",
        of=int,
        least=LEAST_EXACT,
        metavar="N",
    )
    precision: str = option(
        "float32",
        "of the matrix products; bfloat16 is faster, and leaves the residual stream in float32",
        choices=("float32", "bfloat16"),
    )


def measure(subject: Subject, options: AblationOptions) -> dict:
    network, features = subject.network, subject.all_features.sample(options.ablate_passages)
    if options.neurons is None:
        neurons = best_of_each(subject.probes(PROBED_KIND), PROBED)
    else:
        neurons = [parse_neuron(name) for name in options.neurons.split(",")]
    tokens = min(subject.options.max_tokens, MAX_TOKENS)
    found = analyze_ablation(network, features, neurons, options, tokens)
    return {"model": network.name, "passages": features.counts()} | found


def best_of_each(probes: list[Probe], count: int) -> list[tuple[int, int]]:
    """`count` neurons: the best-probing one of each feature, then the second ones, each once."""
    ranks: dict[str, int] = {}
    order = []
    for probe in probes:
        rank = ranks[probe.feature] = ranks.get(probe.feature, -1) + 1
        order.append((rank, -probe.f1, neuron_name(probe.layer, probe.neuron), probe))
    order.sort(key=lambda entry: entry[:3])
    return list(dict.fromkeys((p.layer, p.neuron) for *_, p in order))[:count]


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
    options: AblationOptions,
    max_tokens: int = MAX_TOKENS,
    progress: bool = True,
) -> dict:
    """The ablation's numbers: the rise of the loss per feature, in percent, for each neuron and
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
        for i in range(options.random)
    ]
    losses = ablation_losses(network, features, neurons + control, options, max_tokens, progress)

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
        "how": options.how,
        "precision": options.precision,
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
    options: AblationOptions,
    max_tokens: int = MAX_TOKENS,
    progress: bool = True,
) -> Losses:
    """Mean next-token loss of each feature, and its rise without each neuron."""
    from l2e.analysis.ablated_runs import Passages, ablate, activations_of, first_order

    data = Passages(network, features, max_tokens, options.scored)
    pools = activations_of(network, data, neurons, options)
    per_feature = options.exact or _affordable(network, data, neurons)
    rows = data.sample(per_feature)
    base, linear = np.zeros(len(data)), np.zeros((len(neurons), len(data)))
    if len(rows) < len(data):
        base, linear = first_order(network, data, neurons, pools, options, progress)
    exact = ablate(network, data, rows, neurons, pools, options, progress)
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


def panels(result: dict) -> Panels:
    """The rise of the loss by feature, each neuron a row, above the random neurons' largest."""
    features = list(result["loss"])

    def heat(axes: Axes) -> None:
        rows = [*result["neurons"], *result["random"]]
        values = np.array([[row["increase_percent"][f] for f in features] for row in rows])
        most = max(np.abs(values).max(), 1e-9)
        image = axes.imshow(values, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
        axes.set_xticks(range(len(features)), features, rotation=45, ha="right")
        axes.set_yticks(range(len(rows)), [row["neuron"] for row in rows], fontsize=11)
        axes.axhline(len(result["neurons"]) - 0.5, color="black", linewidth=2)
        axes.set_title(
            f"Activation replaced ({result['how']}); below the line: random neurons", fontsize=13
        )
        axes.grid(False)
        axes.figure.colorbar(image, label="increase of the loss (%)")

    count = len(result["neurons"]) + len(result["random"])
    height = 2.5 + 0.3 * count
    return Panels([Panel("ablate", heat, width=10, height=height, words=tuple(features))])


def notes(result: dict) -> list[str]:
    return [
        f"Activation replaced ({result['how']}); rise of the next-token loss in percent. "
        "Random neurons of the same layers are the control.",
        *_sampled(result),
    ]


def _sampled(result: dict) -> list[str]:
    """How far an ablation that was estimated can be off; nothing of one that was exact."""
    if result["exact_passages"] is None:
        return []
    rows = [*result["neurons"], *result["random"]]
    largest = max(error for row in rows for error in row["increase_percent_stderr"].values())
    correlation = result["first_order_correlation"]
    known = "not defined" if correlation is None else f"{correlation:.2f}"
    return [
        f"{result['exact_passages']} passages of each feature were run exactly, the others to "
        f"first order (correlation of both: {known}); the largest standard error is "
        f"{largest:.2g} percentage points."
    ]


def tables(result: dict) -> list[Table]:
    """A row a feature, so that many features make a long table and no wide one."""
    groups = {"chosen": result["neurons"], "random": result["random"]}
    known = {label: rows for label, rows in groups.items() if rows}
    head = ["feature", "loss (nats)", *(f"{label}, mean |rise| (%)" for label in known)]
    rows = [
        [feature, loss, *(_mean_rise(rows, feature) for rows in known.values())]
        for feature, loss in result["loss"].items()
    ]
    return [Table(head, rows)]


def _mean_rise(rows: list[dict], feature: str) -> float:
    return sum(abs(row["increase_percent"][feature]) for row in rows) / len(rows)


ANALYSIS = Analysis(
    name="ablate",
    title="Ablation",
    help="rise of the loss on each feature without one neuron, random neurons as control",
    on=("model", "features", "activations"),
    options=AblationOptions,
    measure=measure,
    panels=panels,
    notes=notes,
    tables=tables,
)
