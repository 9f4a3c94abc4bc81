"""NeuroMFA: self-organisation of a model over its checkpoints, from weights alone, with controls.

Per checkpoint ten sampled networks give alpha_0 (irregularity) and w (heterogeneity); the degree of
emergence is E(t) = w(t)/w(0) * ln(alpha_0(0)/alpha_0(t)), step 0 being the untrained model. E moves
with the mere scale of the weights, so it comes with the same analysis on weights rescaled to step
0's RMS, on shuffled weights, and on Gaussian weights of equal mean and standard deviation.
"""

import math
from dataclasses import dataclass

import numpy as np

from l2e.analysis.interaction import (
    Checkpoint,
    Layout,
    draw_samples,
    node_counts,
    sampled_network,
)
from l2e.analysis.multifractal import MOMENTS, Spectrum, spectrum
from l2e.progress import Progress

CONTROLS = ("rescaled", "shuffled", "gaussian")


@dataclass(frozen=True)
class Settings:
    """networks: sampled networks a checkpoint (seeds 0, 1, ...). sample: s, nodes per set.
    threshold: T, the longest distance kept. hops: edges of a path. layout: rows of GPT-NeoX's fused
    q, k, v: "per_head" as they are, "flat" as published."""

    networks: int = 10
    sample: int = 64
    threshold: int = 150
    hops: int = 1
    layout: Layout = "per_head"


def analyze_neuromfa(checkpoints: list[Checkpoint], settings: Settings, progress=True) -> dict:
    """The neuromfa verb's result for a series of checkpoints of one model.

    Raises ValueError if the checkpoints differ in shape or none of them yields a spectrum. Without
    a checkpoint of step 0, E and the rescaled control are None, with the reason.
    """
    first = checkpoints[0]
    for other in checkpoints[1:]:
        if other.architecture != first.architecture:
            raise ValueError(
                f"{other.name} is {other.architecture}, but {first.name} is {first.architecture}; "
                "a series must be of one model"
            )
    start = next((c for c in checkpoints if c.step == 0), None)
    samples = [
        draw_samples(first.architecture, settings.sample, seed) for seed in range(settings.networks)
    ]
    origin = None
    if start is not None:
        origin = [sampled_network(start, sample, settings.layout) for sample in samples]
    measured = [
        _measure(checkpoint, samples, origin, settings)
        for checkpoint in Progress(
            checkpoints, desc="networks", unit="checkpoints", progress=progress
        )
    ]
    if all(m["trained"]["alpha_0"] is None for m in measured):
        raise ValueError(f"{first.name}: {measured[0]['trained']['reason']}")
    base = None if start is None else measured[checkpoints.index(start)]
    return {
        "step_0": None if start is None else start.name,
        "moments": MOMENTS.tolist(),
        "checkpoints": [
            _entry(checkpoint, m, base) for checkpoint, m in zip(checkpoints, measured, strict=True)
        ],
    }


def _measure(checkpoint: Checkpoint, samples, origin, settings: Settings) -> dict:
    """All variants of one checkpoint, averaged over its networks."""
    spectra: dict[str, list] = {"trained": []} | {name: [] for name in CONTROLS}
    norms, degrees = [], []
    for seed, sample in enumerate(samples):
        network = sampled_network(checkpoint, sample, settings.layout)
        random = np.random.default_rng(seed)
        variants = {
            "trained": network,
            "shuffled": shuffled(network, random),
            "gaussian": gaussian(network, random),
        }
        if origin is not None:
            variants["rescaled"] = rescaled(network, origin[seed])
        for name, matrices in variants.items():
            counts = node_counts(matrices, settings.threshold, settings.hops)
            try:
                spectra[name].append(spectrum(counts))
            except ValueError as error:
                spectra[name].append(str(error))
        degrees.append(np.mean(np.concatenate([np.abs(m).sum(axis=1) for m in network])))
        norms.append(math.sqrt(sum(float((m**2).sum()) for m in network)))
    result: dict = {name: _average(found) for name, found in spectra.items()}
    result["nodes"] = sum(len(matrix) for matrix in network)
    result["mean_weighted_degree"] = float(np.mean(degrees))
    result["weight_norm"] = float(np.mean(norms))
    return result


def rescaled(network: list[np.ndarray], origin: list[np.ndarray]) -> list[np.ndarray]:
    """Each matrix at the RMS it had at step 0; a matrix of zeros stays as it is."""
    factors = [
        math.sqrt((before**2).mean() / max((now**2).mean(), 1e-300))
        for now, before in zip(network, origin, strict=True)
    ]
    return [matrix * factor for matrix, factor in zip(network, factors, strict=True)]


def shuffled(network: list[np.ndarray], random: np.random.Generator) -> list[np.ndarray]:
    """Each matrix's entries in random places: the same weights without structure."""
    return [random.permutation(m.ravel()).reshape(m.shape) for m in network]


def gaussian(network: list[np.ndarray], random: np.random.Generator) -> list[np.ndarray]:
    """Gaussian entries with each matrix's mean and standard deviation."""
    return [random.normal(m.mean(), m.std(), m.shape) for m in network]


def emergence(alpha_0: float, width: float, start_alpha_0: float, start_width: float) -> float:
    """E(t) = w(t)/w(0) * ln(alpha_0(0)/alpha_0(t)).

    Raises ValueError where it has no value.
    """
    if start_width <= 0 or start_alpha_0 <= 0 or alpha_0 <= 0:
        raise ValueError(
            f"E needs positive w(0) and alpha_0: w(0) = {start_width:.4g}, "
            f"alpha_0(0) = {start_alpha_0:.4g}, alpha_0(t) = {alpha_0:.4g}"
        )
    return width / start_width * math.log(start_alpha_0 / alpha_0)


def _average(found: list[Spectrum | str]) -> dict:
    """Averages over networks; None with the reason if one of them has no spectrum."""
    spectra = [one for one in found if isinstance(one, Spectrum)]
    if len(spectra) < len(found) or not found:
        failed = [one for one in found if isinstance(one, str)]
        reason = failed[0] if failed else "needs a checkpoint of step 0"
        return {"alpha_0": None, "w": None, "reason": reason}
    alpha_0 = np.array([s.alpha_0 for s in spectra])
    width = np.array([s.width for s in spectra])
    return {
        "alpha_0": float(alpha_0.mean()),
        "alpha_0_std": float(alpha_0.std()),
        "w": float(width.mean()),
        "w_std": float(width.std()),
        "fit_r2": float(np.nanmean([s.fit for s in spectra])),
        "fit_r2_least": float(np.nanmin([s.fit for s in spectra])),
        "kept_nodes": float(np.mean([s.nodes for s in spectra])),
        "alpha": np.mean([s.alpha for s in spectra], axis=0).tolist(),
        "f": np.mean([s.f for s in spectra], axis=0).tolist(),
        "networks": np.stack([alpha_0, width], axis=1).tolist(),
    }


def _with_emergence(now: dict, start: dict | None) -> dict:
    """`now` with E against the same variant at step 0, and E's spread over the networks."""
    if now["alpha_0"] is None:
        return now | {"E": None}
    if start is None or start["alpha_0"] is None:
        return now | {"E": None, "reason": "E needs a checkpoint of step 0 in the series"}
    pairs = zip(now["networks"], start["networks"], strict=True)
    try:
        value = emergence(now["alpha_0"], now["w"], start["alpha_0"], start["w"])
        spread = np.std([emergence(*a, *b) for a, b in pairs])
    except ValueError as error:
        return now | {"E": None, "reason": str(error)}
    return now | {"E": value, "E_std": float(spread)}


def _entry(checkpoint: Checkpoint, measured: dict, base: dict | None) -> dict:
    variants = {
        name: _with_emergence(measured[name], base and base[name])
        for name in ("trained", *CONTROLS)
    }
    for variant in variants.values():
        variant.pop("networks", None)
    return {
        "name": checkpoint.name,
        "step": checkpoint.step,
        **variants.pop("trained"),
        "controls": variants,
        "nodes": measured["nodes"],
        "mean_weighted_degree": measured["mean_weighted_degree"],
        "weight_norm": measured["weight_norm"],
    }
