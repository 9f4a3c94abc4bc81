"""Monosemantic Scale by feature: phi_l, phi_l-minus, l*, Kolmogorov-Smirnov, layer profile.

L2E, Equations 2 and 3: over a feature dataset, neuron j's activation z_j has mean and variance
S_j^2 over all passages, a passage's Monosemantic Scale is (z_j - mean_j)^2 / S_j^2, phi_l(j) is its
mean over the passages of feature l, phi_l-minus(j) over all others, and the neuron's relatively
monosemantic feature is l*_j = argmax over l of phi_l(j).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from l2e.analysis.analysis import Analysis, Options, option
from l2e.analysis.figures import Panel, Panels
from l2e.analysis.kinds import PROBED_KIND, kind_option
from l2e.analysis.neurons import neuron_name
from l2e.analysis.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from l2e.analysis.activations import Activations
    from l2e.analysis.probing import Probe
    from l2e.analysis.subject import Subject

RANDOM_NEURONS = 1000
SEED = 42
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
NEURONS_AT_ONCE = 2048


@dataclass(frozen=True)
class ScaleOptions(Options):
    kind: str = kind_option("post_max")
    top: int = option(10, "best-probing neurons shown of each feature", least=0)


def measure(subject: Subject, options: ScaleOptions) -> dict:
    activations = subject.activations(options.kind)
    monosemantic = subject.probes(PROBED_KIND) if options.top else []
    found = analyze_scale(activations, options.kind, monosemantic, options.top)
    return subject.about(options.kind) | found


@dataclass(frozen=True)
class LayerScale:
    """One layer's Monosemantic Scales by feature. A dead neuron (S = 0) has NaN throughout.

    by_feature: phi_l, float64 [features, neurons]; of_others: phi_l-minus, likewise.
    best: l*, int64 [neurons], -1 for a dead neuron.
    mean, std: over passages, float64 [neurons].
    """

    by_feature: np.ndarray
    of_others: np.ndarray
    best: np.ndarray
    mean: np.ndarray
    std: np.ndarray

    @property
    def alive(self) -> np.ndarray:
        return self.best >= 0

    def of_best(self) -> np.ndarray:
        """phi of each neuron's relatively monosemantic feature, [neurons], NaN if dead."""
        return np.where(self.alive, self.by_feature.max(axis=0), np.nan)


def passage_scale(z: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """phi of each passage and neuron, float64 [passages, neurons]; NaN where std is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(std > 0, ((z - mean) / std) ** 2, np.nan)


def layer_scale(z: np.ndarray, labels: np.ndarray, num_features: int) -> LayerScale:
    """Monosemantic Scales of one layer.

    z: activations [passages, neurons], any float dtype; labels: int [passages].
    """
    membership = (labels == np.arange(num_features)[:, None]).astype(np.float64)
    size = membership.sum(axis=1, keepdims=True)
    parts = []
    for start in range(0, z.shape[1], NEURONS_AT_ONCE):
        block = np.asarray(z[:, start : start + NEURONS_AT_ONCE], dtype=np.float64)
        mean, std = block.mean(axis=0), block.std(axis=0, ddof=1)
        std[np.ptp(block, axis=0) == 0] = 0.0
        sums = membership @ passage_scale(block, mean, std)
        others = (sums.sum(axis=0) - sums) / (len(labels) - size)
        parts.append((sums / size, others, mean, std))
    by_feature, of_others, mean, std = (
        np.concatenate(part, axis=-1) for part in zip(*parts, strict=True)
    )
    best = np.where(std > 0, np.nan_to_num(by_feature, nan=-1.0).argmax(axis=0), -1)
    return LayerScale(by_feature, of_others, best, mean, std)


def kolmogorov_smirnov(phi: np.ndarray, own: np.ndarray) -> float:
    """Two-sample K-S statistic: scores of the relatively monosemantic features, and all scores.

    phi: passage scores of some neurons [passages, neurons]; own: where the passage has the
    neuron's relatively monosemantic feature, bool of the same shape.
    """
    from scipy.stats import ks_2samp

    return float(ks_2samp(phi[own], phi.ravel(), method="asymp").statistic)


def analyze_scale(
    activations: Activations, kind: str, monosemantic: list[Probe], per_feature: int = 10
) -> dict:
    """The scale analysis's numbers: layers, ks, and probed against random neurons.

    monosemantic: probes from the monosemantic search, best first; of each feature the first
    `per_feature` are shown.
    """
    from scipy.stats import ks_2samp

    features = activations.features
    random = np.random.default_rng(SEED)
    scales, layers, pooled_own, pooled_all = [], [], [], []
    for layer in range(activations.num_layers):
        z = activations.layer(kind, layer)
        scale = layer_scale(z, features.labels, len(features.names))
        scales.append(scale)
        alive = np.flatnonzero(scale.alive)
        if not len(alive):
            layers.append({"layer": layer, "reason": "every neuron is dead (S = 0)"})
            continue
        drawn = random.permutation(alive)[:RANDOM_NEURONS]
        # The K-S test pools scores over layers: a share of the 1,000 random neurons from each.
        tested = np.sort(drawn[: max(1, RANDOM_NEURONS // activations.num_layers)])
        values = np.asarray(z[:, tested], dtype=np.float64)
        phi = passage_scale(values, scale.mean[tested], scale.std[tested])
        own = features.labels[:, None] == scale.best[tested]
        pooled_own.append(phi[own])
        pooled_all.append(phi.ravel())
        best = scale.of_best()[drawn]
        layers.append(
            {
                "layer": layer,
                "mean_ms": float(best.mean()),
                "std_ms": float(best.std()),
                "neurons": len(drawn),
                "dead": int((~scale.alive).sum()),
                "ks": kolmogorov_smirnov(phi, own),
                "features": {
                    name: int((scale.best == i).sum()) for i, name in enumerate(features.names)
                },
            }
        )
    pooled = [np.concatenate(one) for one in (pooled_own, pooled_all) if one]
    return {
        "kind": kind,
        "layers": layers,
        "ks": float(ks_2samp(*pooled, method="asymp")[0]) if pooled else None,
        "top": _top(scales, monosemantic, features.names, per_feature),
        "random": _random(scales, features.names, per_feature, random),
        "example": _example(activations, monosemantic),
    }


def _example(activations: Activations, monosemantic: list[Probe]) -> dict | None:
    """The best-probing neuron's activations by feature, as the probe saw them: quantiles over
    passages."""
    if not monosemantic:
        return None
    best, features = monosemantic[0], activations.features
    z = np.asarray(activations.layer(PROBED_KIND, best.layer)[:, best.neuron], dtype=np.float64)
    return {
        "neuron": neuron_name(best.layer, best.neuron),
        "feature": best.feature,
        "kind": PROBED_KIND,
        "quantiles": list(QUANTILES),
        "activations": {
            name: np.quantile(z[features.labels == label], QUANTILES).tolist()
            for label, name in enumerate(features.names)
        },
    }


def _top(scales, monosemantic, names, per_feature) -> list[dict]:
    rows = []
    for index, name in enumerate(names):
        for probe in [p for p in monosemantic if p.feature == name][:per_feature]:
            scale = scales[probe.layer]
            if scale.alive[probe.neuron]:
                rows.append(
                    {
                        "neuron": neuron_name(probe.layer, probe.neuron),
                        "feature": name,
                        "f1": probe.f1,
                        "ms": float(scale.by_feature[index, probe.neuron]),
                        "ms_others": float(scale.of_others[index, probe.neuron]),
                    }
                )
    return rows


def _random(scales, names, count, random) -> list[dict]:
    alive = [(layer, n) for layer, s in enumerate(scales) for n in np.flatnonzero(s.alive)]
    rows = []
    for pick in random.permutation(len(alive))[:count]:
        layer, neuron = alive[pick]
        best = scales[layer].best[neuron]
        rows.append(
            {
                "neuron": neuron_name(layer, int(neuron)),
                "feature": names[best],
                "ms": float(scales[layer].by_feature[best, neuron]),
                "ms_others": float(scales[layer].of_others[best, neuron]),
            }
        )
    return rows


MEAN_LABEL = "mean φ of l* ± standard error"


def panels(result: dict) -> Panels:
    """Monosemantic against random neurons; mean MS and K-S by layer."""

    def against(axes: Axes) -> None:
        names = list(dict.fromkeys(row["feature"] for row in result["top"]))
        at = np.arange(len(names) + 1)
        means = [
            [np.mean([r[k] for r in result["top"] if r["feature"] == n]) for n in names]
            for k in ("ms", "ms_others")
        ]
        random = [np.mean([row[key] for row in result["random"]]) for key in ("ms", "ms_others")]
        axes.bar(at - 0.2, [*means[0], random[0]], 0.4, label="on the neuron's own feature")
        axes.bar(at + 0.2, [*means[1], random[1]], 0.4, label="on all other features")
        for index, name in enumerate(names):
            own = [row["ms"] for row in result["top"] if row["feature"] == name]
            axes.plot([index - 0.2] * len(own), own, "k.", markersize=4)
        axes.set_xticks(at, [*names, "random\nneurons"], rotation=45, ha="right")
        axes.axvline(len(names) - 0.5, color="grey", linewidth=1)
        axes.set_ylabel("Monosemantic Scale φ")
        axes.set_xlabel("feature whose best-probing neurons (dots) are averaged")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)

    def profile(axes: Axes) -> None:
        rows = [row for row in result["layers"] if "reason" not in row]
        layers = [row["layer"] for row in rows]
        axes.errorbar(
            layers,
            [r["mean_ms"] for r in rows],
            [r["std_ms"] / np.sqrt(r["neurons"]) for r in rows],
            marker="o",
            capsize=4,
            label=MEAN_LABEL,
        )
        axes.set_xlabel("layer")
        axes.set_ylabel("mean MS of random neurons")
        axes.set_xticks(layers)
        right = axes.twinx()
        right.plot(layers, [r["ks"] for r in rows], "s--", color="tab:orange", label="K-S")
        right.set_ylabel("K-S statistic")
        right.grid(False)
        right.spines["right"].set_visible(True)
        lines = [*axes.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
        axes.legend(
            lines,
            [MEAN_LABEL, "K-S"],
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            ncols=2,
        )

    def example(axes: Axes) -> None:
        found = result["example"]
        names = list(found["activations"])
        keys = ("whislo", "q1", "med", "q3", "whishi")
        boxes = [dict(zip(keys, found["activations"][n], strict=True)) for n in names]
        axes.bxp(boxes, showfliers=False)
        axes.set_xticks(range(1, len(names) + 1), names, rotation=45, ha="right")
        axes.set_ylabel(f"activation of {found['neuron']} ({found['kind'].replace('_', ', ')})")
        axes.set_title(
            f"Best single-neuron probe ({found['feature']}): 5, 25, 50, 75, 95 % of passages",
            fontsize=13,
        )

    found = Panels([Panel("scale_layers", profile)])
    if result["top"]:
        words = tuple(result["example"]["activations"])
        found.append(Panel("scale_monosemantic", against, width=10, words=words))
        found.append(Panel("scale_example", example, width=10, words=words))
    return found


def notes(result: dict) -> list[str]:
    if result["ks"] is None:
        return []
    return [
        "K-S statistic between the scores of the relatively monosemantic features and of the "
        f"whole set: {result['ks']:.3f}."
    ]


def tables(result: dict) -> list[Table]:
    head = ["layer", "mean MS", "K-S", "neurons", "dead"]
    keys = ("layer", "mean_ms", "ks", "neurons", "dead")
    return [Table(head, [[row.get(key) for key in keys] for row in result["layers"]])]


def points(result: dict) -> list[dict[str, float | None]]:
    return [{"mean MS": mean_of(result["layers"], "mean_ms"), "K-S": result["ks"]}]


def mean_of(rows: list[dict], key: str) -> float | None:
    """The mean of a key over those rows that have it."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return float(np.mean(values)) if values else None


ANALYSIS = Analysis(
    name="scale",
    title="Monosemantic Scale",
    help="Monosemantic Scale by feature, probed against random neurons, K-S, layer profile",
    on=("model", "features", "activations"),
    options=ScaleOptions,
    measure=measure,
    panels=panels,
    notes=notes,
    tables=tables,
    points=points,
    while_followed={"top": 0},  # the probing that finds them is most of the work
)
