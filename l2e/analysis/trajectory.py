"""Any measure over steps and model sizes, runs of the same size being seeds of one band."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from l2e.analysis.activations import Activations
from l2e.analysis.fkr import LAYER_SHARE, analyze_fkr
from l2e.analysis.interaction import Checkpoint
from l2e.analysis.networks import Network
from l2e.analysis.neuromfa import Settings, analyze_neuromfa
from l2e.analysis.probing import PROBED_KIND, analyze_probe
from l2e.analysis.proxies import analyze_proxies
from l2e.analysis.scale import analyze_scale

Point = dict


def _mean(rows: list[dict], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    return float(np.mean(values)) if values else None


def scale_point(network: Network, activations: Activations) -> Point:
    result = analyze_scale(activations, "post_max", [])
    return {"mean MS": _mean(result["layers"], "mean_ms"), "K-S": result["ks"]}


def fkr_point(network: Network, activations: Activations) -> Point:
    result = analyze_fkr(activations, "post_max")
    at = next(point["fkr"] for point in result["curve"] if point["k"] == LAYER_SHARE)
    return {"FKR at k = 2 %": at, "k of least FKR": result["least"]["k"]}


def probe_point(network: Network, activations: Activations) -> Point:
    result = analyze_probe(activations, PROBED_KIND, progress=False)
    best: dict[str, float] = {}
    for row in result["neurons"]:
        best.setdefault(row["feature"], row["f1"])
    return {"best single-neuron F1, mean over features": float(np.mean(list(best.values())))}


def proxies_point(network: Network, activations: Activations) -> Point:
    layers = analyze_proxies(network, activations, "post_max")["layers"]
    return {name: _mean(layers, name) for name in ("decorrelation", "kurtosis", "sparsity")}


MEASURES: dict[str, Callable[[Network, Activations], Point]] = {
    "scale": scale_point,
    "fkr": fkr_point,
    "probe": probe_point,
    "proxies": proxies_point,
}


def neuromfa_points(checkpoints: list[Checkpoint], settings: Settings) -> list[Point]:
    """alpha_0, w and E of each checkpoint, and E of the weights rescaled to step 0's RMS."""
    rows = analyze_neuromfa(checkpoints, settings)["checkpoints"]
    return [
        {
            "$\\alpha_0$": row["alpha_0"],
            "w": row["w"],
            "E": row["E"],
            "E, weights rescaled": row["controls"]["rescaled"]["E"],
        }
        for row in rows
    ]


def run_of(name: str) -> str:
    """What a checkpoint's name says of its run: the folder around it, or the id before @."""
    return name.rsplit("@", 1)[0] if "@" in name else str(Path(name).parent)


def gather(points: list[dict]) -> dict:
    """The trajectory verb's result.

    points: {"name", "step", "parameters", "measures"} of each checkpoint. Runs with equally many
    parameters are seeds: of each step their mean and range are given.

    Raises ValueError for a checkpoint whose name holds no step.
    """
    unnamed = [point["name"] for point in points if point["step"] is None]
    if unnamed:
        raise ValueError(
            f"no step in the name of {unnamed[0]}: a trajectory needs names such as step1000, "
            "checkpoints/step_0001000 or id@step1000"
        )
    lines = []
    for measure in dict.fromkeys(m for point in points for m in point["measures"]):
        for size in sorted({point["parameters"] for point in points}):
            own = [p for p in points if p["parameters"] == size and measure in p["measures"]]
            rows = []
            for step in sorted({point["step"] for point in own}):
                values = [p["measures"][measure] for p in own if p["step"] == step]
                known = [value for value in values if value is not None]
                if known:
                    spread = {"low": min(known), "high": max(known), "seeds": len(known)}
                    rows.append({"step": step, "mean": float(np.mean(known)), **spread})
            lines.append({"measure": measure, "parameters": size, "points": rows})
    return {"lines": lines, "checkpoints": points}
