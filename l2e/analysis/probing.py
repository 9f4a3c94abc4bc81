"""Sparse probing: which neurons tell a feature from the rest (Gurnee et al. 2023).

Passages are split 70/30; neurons are ranked on the training part by |mean(feature) - mean(rest)|,
and a balanced L2 logistic regression on the first k of them is scored on the held-out part.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from l2e.analysis.analysis import Analysis, Options
from l2e.analysis.figures import Panel, Panels, colours
from l2e.analysis.kinds import PROBED_KIND, kind_option
from l2e.analysis.neurons import neuron_name
from l2e.analysis.tables import Table
from l2e.progress import Progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from l2e.analysis.activations import Activations
    from l2e.analysis.features import FeatureSet
    from l2e.analysis.subject import Subject

SEED = 42
HELD_OUT = 0.3
FEWEST_TEXTS = 10
CANDIDATES = 30
SIZES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class ProbeOptions(Options):
    kind: str = kind_option(PROBED_KIND)


def measure(subject: Subject, options: ProbeOptions) -> dict:
    activations, probes = subject.activations(options.kind), subject.probes(options.kind)
    return subject.about(options.kind) | analyze_probe(activations, options.kind, probes)


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
    from sklearn.model_selection import train_test_split

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
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score, matthews_corrcoef, precision_score, recall_score

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


def analyze_probe(
    activations: Activations, kind: str, probes: list[Probe] | None = None, progress: bool = True
) -> dict:
    """The probe analysis's numbers: single neurons best first, sizes k, and the controls.

    probes: what `find_monosemantic` found, if that is done already.
    """
    features = activations.features
    split = split_passages(features)
    shuffled = permuted(features)
    if probes is None:
        probes = find_monosemantic(activations, kind, progress)
    control, sizes = [], []
    for layer in by_layer(activations, progress):
        z = scale_neurons(activations.layer(kind, layer), split)
        control += search_layer(z, layer, shuffled, split)
        sizes += probe_sizes(z, layer, features, split)
    test = features.labels[split.test]
    share = {name: float((test == label).mean()) for label, name in enumerate(features.names)}
    known = sorted({row["k"] for row in sizes})
    return {
        "kind": kind,
        "neurons": [asdict(probe) for probe in probes],
        "sizes": [_best_layer(sizes, name, k) for name in features.names for k in known],
        "always_yes_f1": {name: 2 * s / (1 + s) for name, s in share.items()},
        "neurons_ranked": activations.num_layers * z.shape[1],
        "neurons_probed": len(probes),
        "permutation": {name: _best(name, control) for name in features.names},
        "passages": {"train": len(split.train), "held_out": len(split.test)},
    }


def _best_layer(rows: list[dict], feature: str, size: int) -> dict:
    """The layer whose k-neuron probe of a feature has the highest F1."""
    own = (row for row in rows if row["feature"] == feature and row["k"] == size)
    return max(own, key=lambda row: row["f1"])


def _best(name: str, probes: list[Probe]) -> dict[str, float]:
    """The highest F1 and MCC any neuron reached for a feature."""
    own = [probe for probe in probes if probe.feature == name]
    return {"f1": max(p.f1 for p in own), "mcc": max(p.mcc for p in own)}


def panels(result: dict) -> Panels:
    """F1 of the best probe by number of neurons, and single neurons against their controls."""
    features = list(result["always_yes_f1"])

    def sizes(axes: Axes) -> None:
        lines = []
        for feature, colour in zip(features, colours("tab20", len(features)), strict=True):
            rows = [row for row in result["sizes"] if row["feature"] == feature]
            lines += axes.plot([r["k"] for r in rows], [r["f1"] for r in rows], "o-", color=colour)
        axes.set_xscale("log", base=2)
        ticks = sorted({row["k"] for row in result["sizes"]})
        axes.set_xticks(ticks, ticks)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("neurons in the probe (best layer)")
        axes.set_ylabel("F1 on held-out passages")
        axes.legend(lines, features, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=11)

    def single(axes: Axes) -> None:
        at = np.arange(len(features))
        best = [max(n["f1"] for n in result["neurons"] if n["feature"] == f) for f in features]
        axes.bar(at - 0.27, best, 0.27, label="best single neuron")
        axes.bar(
            at,
            [result["permutation"][f]["f1"] for f in features],
            0.27,
            label="best with shuffled labels",
        )
        axes.bar(
            at + 0.27, [result["always_yes_f1"][f] for f in features], 0.27, label="always yes"
        )
        axes.set_xticks(at, features, rotation=45, ha="right")
        axes.set_ylim(0, 1.25)
        axes.set_yticks(np.arange(0, 1.01, 0.2))
        axes.set_ylabel("F1 on held-out passages")
        axes.legend(ncols=3, loc="upper center", fontsize=11)

    words = tuple(features)
    return Panels(
        [
            Panel("probe_sizes", sizes, width=10, words=words),
            Panel("probe_single", single, width=10, words=words),
        ]
    )


def notes(result: dict) -> list[str]:
    passages = result["passages"]
    return [
        f"{result['neurons_probed']:,} one-neuron probes out of {result['neurons_ranked']:,} "
        f"ranked neurons, fitted on {passages['train']:,} passages and scored on "
        f"{passages['held_out']:,}. The same search with shuffled labels is the control."
    ]


def tables(result: dict) -> list[Table]:
    best: dict[str, dict] = {}
    for row in result["neurons"]:
        best.setdefault(row["feature"], row)
    head = ["feature", "best neuron", "F1", "MCC", "precision", "recall"]
    head += ["F1, labels shuffled", "F1, always yes"]
    rows = [
        [
            feature,
            neuron_name(row["layer"], row["neuron"]),
            *(row[key] for key in ("f1", "mcc", "precision", "recall")),
            result["permutation"][feature]["f1"],
            result["always_yes_f1"][feature],
        ]
        for feature, row in sorted(best.items())
    ]
    return [Table(head, rows)]


def points(result: dict) -> list[dict[str, float | None]]:
    best: dict[str, float] = {}
    for row in result["neurons"]:
        best.setdefault(row["feature"], row["f1"])
    mean = float(np.mean(list(best.values())))
    return [{"best single-neuron F1, mean over features": mean}]


ANALYSIS = Analysis(
    name="probe",
    title="Sparse probing",
    help="sparse probing: which neurons tell a feature, with permutation control",
    on=("model", "features", "activations"),
    options=ProbeOptions,
    measure=measure,
    panels=panels,
    notes=notes,
    tables=tables,
    points=points,
)
