"""Monosemantic Scale by feature: phi_l, phi_l-minus, l*, Kolmogorov-Smirnov, layer profile.

L2E, Equations 2 and 3: over a feature dataset, neuron j's activation z_j has mean and variance
S_j^2 over all passages, a passage's Monosemantic Scale is (z_j - mean_j)^2 / S_j^2, phi_l(j) is its
mean over the passages of feature l, phi_l-minus(j) over all others, and the neuron's relatively
monosemantic feature is l*_j = argmax over l of phi_l(j).
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import ks_2samp

from l2e.analysis.activations import Activations
from l2e.analysis.networks import neuron_name
from l2e.analysis.probing import PROBED_KIND, Probe

RANDOM_NEURONS = 1000
SEED = 42
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
NEURONS_AT_ONCE = 2048


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
    return float(ks_2samp(phi[own], phi.ravel(), method="asymp").statistic)


def analyze_scale(
    activations: Activations, kind: str, monosemantic: list[Probe], per_feature: int = 10
) -> dict:
    """The scale verb's result: layers, ks, and probed against random neurons.

    monosemantic: probes from the monosemantic search, best first; of each feature the first
    `per_feature` are shown.
    """
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
        tested = drawn[: max(1, RANDOM_NEURONS // activations.num_layers)]
        phi = passage_scale(
            np.asarray(z[:, np.sort(tested)], dtype=np.float64),
            scale.mean[np.sort(tested)],
            scale.std[np.sort(tested)],
        )
        own = features.labels[:, None] == scale.best[np.sort(tested)]
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
    ks = None
    if pooled_own:
        ks = float(
            ks_2samp(np.concatenate(pooled_own), np.concatenate(pooled_all), method="asymp")[0]
        )
    return {
        "kind": kind,
        "layers": layers,
        "ks": ks,
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
