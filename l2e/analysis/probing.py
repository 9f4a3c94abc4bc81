"""Sparse probing: which neurons tell a feature from the rest (Gurnee et al. 2023).

Passages are split 70/30; neurons are ranked on the training part by |mean(feature) - mean(rest)|,
and a balanced L2 logistic regression on the first k of them is scored on the held-out part.
"""

import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, matthews_corrcoef, precision_score, recall_score
from sklearn.model_selection import train_test_split

from l2e.analysis.activations import Activations
from l2e.analysis.features import FeatureSet
from l2e.progress import Progress

SEED = 42
PROBED_KIND = "pre_mean"
HELD_OUT = 0.3
FEWEST_TEXTS = 10
CANDIDATES = 30
SIZES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Probe:
    """A one-neuron probe and its scores on held-out passages."""

    layer: int
    neuron: int
    feature: str
    f1: float
    mcc: float
    precision: float
    recall: float


@dataclass(frozen=True)
class Split:
    """Rows of the training and the held-out passages, features in equal proportions."""

    train: np.ndarray
    test: np.ndarray


def split_passages(features: FeatureSet) -> Split:
    """70/30 with seed 42, of texts: a text's copies are all on one side, under whatever feature.

    Raises ValueError if a feature has fewer than 10 texts.
    """
    _, first = np.unique(features.text_of, return_index=True)
    labels = features.labels[first]  # of a text under several features, the first
    counts = np.bincount(labels, minlength=len(features.names)).tolist()
    few = [
        f"{name} ({count})"
        for name, count in zip(features.names, counts, strict=True)
        if count < FEWEST_TEXTS
    ]
    if few:
        raise ValueError(
            f"{features.name}: a 70/30 split needs at least {FEWEST_TEXTS} passages of each "
            f"feature, copies counted once; too few of {', '.join(few)}. Add passages or remove "
            "the feature"
        )
    train, _ = train_test_split(
        np.arange(len(first)), test_size=HELD_OUT, random_state=SEED, stratify=labels
    )
    trained = np.isin(features.text_of, train)
    return Split(np.flatnonzero(trained), np.flatnonzero(~trained))


def scale_neurons(z: np.ndarray, split: Split) -> np.ndarray:
    """Each neuron over 10 * max(its training std, 0.001), float32 [passages, neurons]."""
    values = np.asarray(z, dtype=np.float32)
    return values / (10 * np.maximum(values[split.train].std(axis=0), 1e-3))


def rank_neurons(z: np.ndarray, is_feature: np.ndarray) -> np.ndarray:
    """Neurons by |mean(feature) - mean(rest)|, largest first. z: training rows [rows, neurons]."""
    difference = z[is_feature].mean(axis=0) - z[~is_feature].mean(axis=0)
    return np.argsort(-np.abs(difference), kind="stable")


def probe_scores(z: np.ndarray, is_feature: np.ndarray, split: Split) -> dict[str, float]:
    """Fit on the training rows of z [passages, k]; F1, MCC, precision and recall held out."""
    classifier = LogisticRegression(class_weight="balanced", max_iter=200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(z[split.train], is_feature[split.train])
    said, true = classifier.predict(z[split.test]), is_feature[split.test]
    return {
        "f1": float(f1_score(true, said, zero_division=0)),
        "mcc": float(matthews_corrcoef(true, said)),
        "precision": float(precision_score(true, said, zero_division=0)),
        "recall": float(recall_score(true, said, zero_division=0)),
    }


def search_layer(z: np.ndarray, layer: int, features: FeatureSet, split: Split) -> list[Probe]:
    """One-neuron probes of the first 30 ranked neurons of one layer, for each feature.

    z: scaled activations [passages, neurons].
    """
    probes = []
    for label, name in enumerate(features.names):
        is_feature = features.labels == label
        ranked = rank_neurons(z[split.train], is_feature[split.train])[:CANDIDATES]
        for neuron in ranked:
            scores = probe_scores(z[:, neuron : neuron + 1], is_feature, split)
            probes.append(Probe(layer, int(neuron), name, **scores))
    return probes


def probe_sizes(z: np.ndarray, layer: int, features: FeatureSet, split: Split) -> list[dict]:
    """Probes on one layer's first k neurons, for each feature and k."""
    rows = []
    for label, name in enumerate(features.names):
        is_feature = features.labels == label
        ranked = rank_neurons(z[split.train], is_feature[split.train])
        for size in (size for size in SIZES if size <= z.shape[1]):
            scores = probe_scores(z[:, ranked[:size]], is_feature, split)
            rows.append({"feature": name, "k": size, "layer": layer} | scores)
    return rows


def permuted(features: FeatureSet) -> FeatureSet:
    """The same passages with labels shuffled over texts, copies alike: what a probe finds where
    there is nothing."""
    _, first = np.unique(features.text_of, return_index=True)
    shuffled = np.random.default_rng(SEED).permutation(features.labels[first])
    return replace(features, labels=shuffled[features.text_of])


def best_first(probes: list[Probe]) -> list[Probe]:
    return sorted(probes, key=lambda probe: (-probe.f1, -probe.mcc))


def by_layer(activations: Activations, progress: bool) -> Iterable[int]:
    return Progress(range(activations.num_layers), desc="probing", unit="layers", progress=progress)


def find_monosemantic(activations: Activations, kind: str, progress: bool = True) -> list[Probe]:
    """The monosemantic search over all layers, best F1 first."""
    split = split_passages(activations.features)
    probes = []
    for layer in by_layer(activations, progress):
        z = scale_neurons(activations.layer(kind, layer), split)
        probes += search_layer(z, layer, activations.features, split)
    return best_first(probes)


def analyze_probe(activations: Activations, kind: str, progress: bool = True) -> dict:
    """The probe verb's result: single neurons best first, sizes k, and the controls."""
    features = activations.features
    split = split_passages(features)
    shuffled = permuted(features)
    probes, control, sizes = [], [], []
    for layer in by_layer(activations, progress):
        z = scale_neurons(activations.layer(kind, layer), split)
        probes += search_layer(z, layer, features, split)
        control += search_layer(z, layer, shuffled, split)
        sizes += probe_sizes(z, layer, features, split)
    test = features.labels[split.test]
    share = {name: float((test == label).mean()) for label, name in enumerate(features.names)}
    return {
        "kind": kind,
        "neurons": [asdict(probe) for probe in best_first(probes)],
        "sizes": [_best_layer(sizes, name, k) for name in features.names for k in _sizes(sizes)],
        "always_yes_f1": {name: 2 * s / (1 + s) for name, s in share.items()},
        "neurons_ranked": activations.num_layers * z.shape[1],
        "neurons_probed": len(probes),
        "permutation": {name: _best(name, control) for name in features.names},
        "passages": {"train": len(split.train), "held_out": len(split.test)},
    }


def _sizes(rows: list[dict]) -> list[int]:
    return sorted({row["k"] for row in rows})


def _best_layer(rows: list[dict], feature: str, size: int) -> dict:
    """The layer whose k-neuron probe of a feature has the highest F1."""
    own = (row for row in rows if row["feature"] == feature and row["k"] == size)
    return max(own, key=lambda row: row["f1"])


def _best(name: str, probes: list[Probe]) -> dict[str, float]:
    """The highest F1 and MCC any neuron reached for a feature."""
    own = [probe for probe in probes if probe.feature == name]
    return {"f1": max(p.f1 for p in own), "mcc": max(p.mcc for p in own)}
