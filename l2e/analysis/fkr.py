"""False Killing Rate: how much of what would be inhibited is not monosemantic (L2E, Equation 4).

FKR(k) = #{(i, j): phi(z_j[i]) >= tau_k and x[i] not in l*_j} / #{(i, j): phi(z_j[i]) >= tau_k},
over passages i and the neurons j of one layer, tau_k being the layer's k-th largest share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from l2e.analysis.analysis import Analysis, Options
from l2e.analysis.figures import Panel, Panels
from l2e.analysis.kinds import kind_option
from l2e.analysis.scale import NEURONS_AT_ONCE, layer_scale, passage_scale
from l2e.analysis.tables import Table, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from l2e.analysis.activations import Activations
    from l2e.analysis.subject import Subject

SHARES: tuple[float, ...] = (
    *(0.001, 0.002, 0.003, 0.005, 0.007, 0.01, 0.015),
    *(0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.15, 0.2),
)
LAYER_SHARE = 0.02


@dataclass(frozen=True)
class FKROptions(Options):
    kind: str = kind_option("post_max")


def measure(subject: Subject, options: FKROptions) -> dict:
    activations = subject.activations(options.kind)
    return subject.about(options.kind) | analyze_fkr(activations, options.kind)


def killed(
    z: np.ndarray, labels: np.ndarray, num_features: int, shares: tuple[float, ...] = SHARES
) -> tuple[np.ndarray, np.ndarray, float] | None:
    """Per share, how many entries reach tau and how many of those are falsely killed; and the
    false share of all entries, which is what killing at random would give.

    z: one layer's activations [passages, neurons]. Dead neurons don't count; None if all are.
    """
    scale = layer_scale(z, labels, num_features)
    alive = np.flatnonzero(scale.alive)
    if not len(alive):
        return None
    scores = np.empty((len(labels), len(alive)), dtype=np.float32)
    for start in range(0, len(alive), NEURONS_AT_ONCE):
        some = alive[start : start + NEURONS_AT_ONCE]
        values = np.asarray(z[:, some], dtype=np.float64)
        scores[:, start : start + len(some)] = passage_scale(
            values, scale.mean[some], scale.std[some]
        )
    phi = scores.ravel()
    false = (labels[:, None] != scale.best[alive]).ravel()
    at_random = float(false.mean())

    largest = np.ceil(np.array(shares) * phi.size).astype(int)
    kept = phi >= np.partition(phi, -largest.max())[-largest.max()]
    order = np.argsort(-phi[kept], kind="stable")
    phi, falsely = phi[kept][order], np.cumsum(false[kept][order])
    tau = phi[largest - 1]
    reached = np.searchsorted(-phi, -tau, side="right")  # ties with tau are killed too
    return reached, falsely[reached - 1], at_random


def analyze_fkr(activations: Activations, kind: str, shares: tuple[float, ...] = SHARES) -> dict:
    """The fkr analysis's numbers: the curve over k, pooled over layers, and each layer at k = 2 %.

    Raises ValueError if no neuron's activation varies.
    """
    features = activations.features
    shares = tuple(sorted({*shares, LAYER_SHARE}))
    pooled = np.zeros((2, len(shares)))
    layers: list[dict] = []
    at_random: list[float] = []
    for layer in range(activations.num_layers):
        z = activations.layer(kind, layer)
        counts = killed(z, features.labels, len(features.names), shares)
        if counts is None:
            layers.append({"layer": layer, "fkr": None, "reason": "every neuron is dead (S = 0)"})
            continue
        pooled += counts[:2]
        at_random.append(counts[2])
        curve = _curve(shares, *counts[:2])
        at_share = curve[shares.index(LAYER_SHARE)]["fkr"]
        layers.append({"layer": layer, "fkr": at_share, "at_random": counts[2], "curve": curve})
    if not at_random:
        raise ValueError("no neuron's activation varies over the passages: FKR has no meaning here")
    curve = _curve(shares, *pooled)
    return {
        "kind": kind,
        "curve": curve,
        "layers": layers,
        "least": min(curve, key=lambda point: point["fkr"]),
        "at_random": float(np.mean(at_random)),
    }


def _curve(shares: tuple[float, ...], reached: np.ndarray, false: np.ndarray) -> list[dict]:
    return [{"k": k, "fkr": float(f / r)} for k, r, f in zip(shares, reached, false, strict=True)]


def panels(result: dict) -> Panels:
    """FKR over k with the least marked, and by layer at k = 2 %."""

    def curve(axes: Axes) -> None:
        k = [100 * point["k"] for point in result["curve"]]
        axes.plot(k, [100 * point["fkr"] for point in result["curve"]], "o-", label="all layers")
        least = result["least"]
        axes.plot(
            100 * least["k"],
            100 * least["fkr"],
            "*",
            color="tab:red",
            markersize=18,
            label=f"least: {100 * least['fkr']:.1f} % at k = {100 * least['k']:g} %",
        )
        axes.axhline(
            100 * result["at_random"],
            color="grey",
            linestyle=":",
            label=f"killing at random: {100 * result['at_random']:.1f} %",
        )
        axes.set_xscale("log")
        ticks = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("inhibition level k (%)")
        axes.set_ylabel("False Killing Rate (%)")
        axes.legend()

    def layers(axes: Axes) -> None:
        rows = [row for row in result["layers"] if row["fkr"] is not None]
        axes.bar([row["layer"] for row in rows], [100 * row["fkr"] for row in rows], 0.6)
        axes.set_xticks([row["layer"] for row in rows])
        axes.set_xlabel("layer")
        axes.set_ylabel("False Killing Rate at k = 2 % (%)")

    return Panels([Panel("fkr_curve", curve), Panel("fkr_layers", layers)])


def notes(result: dict) -> list[str]:
    least = result["least"]
    return [
        f"Least FKR {percent(least['fkr'])} at k = {percent(least['k'])}; killing at random "
        f"would give {percent(result['at_random'])}."
    ]


def tables(result: dict) -> list[Table]:
    rows = [[percent(point["k"]), percent(point["fkr"])] for point in result["curve"]]
    return [Table(["k", "FKR"], rows)]


def points(result: dict) -> list[dict[str, float | None]]:
    at = next(point["fkr"] for point in result["curve"] if point["k"] == LAYER_SHARE)
    return [{"FKR at k = 2 %": at, "k of least FKR": result["least"]["k"]}]


ANALYSIS = Analysis(
    name="fkr",
    title="False Killing Rate",
    help="False Killing Rate over the inhibition level k and by layer",
    on=("model", "features", "activations"),
    options=FKROptions,
    measure=measure,
    panels=panels,
    notes=notes,
    tables=tables,
    points=points,
)
