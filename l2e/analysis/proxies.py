"""Cheap stand-ins for the Monosemantic Scale, beside it, with their rank correlations.

Per neuron: b * ||w_in|| from weights alone, and the kurtosis and sparsity of its activations. Per
layer: feature decorrelation (Yan et al. 2024), 1 - the mean cosine similarity between the layer's
activations on different inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from l2e.analysis.analysis import Analysis, Options
from l2e.analysis.figures import Panel, Panels
from l2e.analysis.kinds import kind_option
from l2e.analysis.scale import layer_scale, mean_of
from l2e.analysis.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from l2e.analysis.activations import Activations
    from l2e.analysis.networks import Layer, Network
    from l2e.analysis.subject import Subject

NEURON_PROXIES = ("bias_norm", "kurtosis", "sparsity")


@dataclass(frozen=True)
class ProxyOptions(Options):
    kind: str = kind_option("post_max")


def measure(subject: Subject, options: ProxyOptions) -> dict:
    activations = subject.activations(options.kind)
    found = analyze_proxies(subject.network, activations, options.kind)
    return subject.about(options.kind) | found


def bias_norm(layer: Layer) -> np.ndarray | None:
    """b_in * ||w_in||_2 per neuron, [neurons]; None where the MLP has no biases."""
    bias = layer.input_bias()
    if bias is None:
        return None
    return (bias * layer.input_weight().norm(dim=1)).double().cpu().numpy()


def sparsity(z: np.ndarray) -> np.ndarray:
    """1 - E[|z|]^2 / E[z^2] per neuron: 0 if |z| is constant, near 1 if it rarely differs from 0.

    z: [passages, neurons]. NaN for a neuron that is always 0.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        return 1 - np.abs(z).mean(axis=0) ** 2 / (z**2).mean(axis=0)


def decorrelation(z: np.ndarray) -> float:
    """1 - the mean cosine similarity of all pairs of passages. z: [passages, neurons].

    The sum over pairs is |sum of the unit vectors|^2 less the passages' own, so no pair is formed.
    """
    norm = np.linalg.norm(z, axis=1, keepdims=True)
    unit = z[norm[:, 0] > 0] / norm[norm[:, 0] > 0]
    count = len(unit)
    if count < 2:
        return float("nan")
    return float(1 - (np.sum(unit.sum(axis=0) ** 2) - count) / (count * (count - 1)))


def analyze_proxies(network: Network, activations: Activations, kind: str) -> dict:
    """The numbers: per layer each measure's mean and its rank correlation with MS."""
    from scipy.stats import kurtosis

    features = activations.features
    layers: list[dict] = []
    pooled: dict[str, list[np.ndarray]] = {name: [] for name in (*NEURON_PROXIES, "ms")}
    for number, layer in enumerate(network.layers):
        z = np.asarray(activations.layer(kind, number), dtype=np.float64)
        scale = layer_scale(z, features.labels, len(features.names))
        alive = scale.alive
        ms = scale.of_best()
        values: dict[str, np.ndarray | None] = {
            "bias_norm": bias_norm(layer),
            "kurtosis": kurtosis(z, axis=0, nan_policy="propagate"),
            "sparsity": sparsity(z),
            "ms": ms,
        }
        entry: dict = {"layer": number, "decorrelation": decorrelation(z)}
        for name, value in values.items():
            if value is None:
                entry[name] = None
                entry["reason"] = "this MLP has no input biases, so b * ||w|| has no value"
                continue
            entry[name] = float(value[alive].mean()) if alive.any() else None
            pooled[name].append(value[alive])
        entry["rank_correlation_with_ms"] = {
            name: _spearman(value, ms, alive)
            for name, value in values.items()
            if name != "ms" and value is not None
        }
        layers.append(entry)
    joined = {name: np.concatenate(parts) for name, parts in pooled.items() if parts}
    names = list(joined)
    return {
        "kind": kind,
        "layers": layers,
        "rank_correlations": {
            a: {b: _spearman(joined[a], joined[b]) for b in names} for a in names
        },
        "layer_rank_correlation": {
            "decorrelation_and_ms": _spearman(
                np.array([layer["decorrelation"] for layer in layers]),
                np.array([np.nan if layer["ms"] is None else layer["ms"] for layer in layers]),
            )
        },
    }


def _spearman(a: np.ndarray, b: np.ndarray, where: np.ndarray | None = None) -> float | None:
    """Spearman's rank correlation over entries where both are finite; None of fewer than three,
    or where one of them is constant."""
    from scipy.stats import spearmanr

    keep = np.isfinite(a) & np.isfinite(b) & (True if where is None else where)
    if keep.sum() < 3 or np.ptp(a[keep]) == 0 or np.ptp(b[keep]) == 0:
        return None
    return float(spearmanr(a[keep], b[keep]).statistic)


def panels(result: dict) -> Panels:
    """Rank correlations between the measures of a neuron."""
    names = list(result["rank_correlations"])
    labels = {"bias_norm": "b·||w||", "kurtosis": "kurtosis", "sparsity": "sparsity", "ms": "MS"}

    def correlations(axes: Axes) -> None:
        values = np.array(
            [[result["rank_correlations"][a][b] for b in names] for a in names], dtype=float
        )
        image = axes.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1)
        for (row, column), value in np.ndenumerate(values):
            axes.text(
                column,
                row,
                f"{value:.2f}",
                ha="center",
                va="center",
                color="white" if abs(value) > 0.6 else "black",
            )
        ticks = [labels[name] for name in names]
        axes.set_xticks(range(len(names)), ticks)
        axes.set_yticks(range(len(names)), ticks)
        axes.grid(False)
        axes.figure.colorbar(image, label="Spearman's rank correlation over neurons")

    return Panels([Panel("proxies", correlations, width=7)])


def notes(result: dict) -> list[str]:
    value = result["layer_rank_correlation"]["decorrelation_and_ms"]
    known = "not defined" if value is None else f"{value:.2f}"
    return [f"Rank correlation of feature decorrelation with MS over layers: {known}."]


def tables(result: dict) -> list[Table]:
    measures = ("layer", "ms", "bias_norm", "kurtosis", "sparsity", "decorrelation")
    head = ["layer", "MS", "b·||w||", "kurtosis", "sparsity", "decorrelation"]
    return [Table(head, [[row[key] for key in measures] for row in result["layers"]])]


def points(result: dict) -> list[dict[str, float | None]]:
    names = ("decorrelation", "kurtosis", "sparsity")
    return [{name: mean_of(result["layers"], name) for name in names}]


ANALYSIS = Analysis(
    name="proxies",
    title="Proxies",
    help="b*||w||, feature decorrelation, kurtosis and sparsity beside MS",
    on=("model", "features", "activations"),
    options=ProxyOptions,
    measure=measure,
    panels=panels,
    notes=notes,
    tables=tables,
    points=points,
)
