"""NeuroMFA: self-organisation of a model over its checkpoints, from weights alone, with controls.

Per checkpoint ten sampled networks give alpha_0 (irregularity) and w (heterogeneity); the degree of
emergence is E(t) = w(t)/w(0) * ln(alpha_0(0)/alpha_0(t)), step 0 being the untrained model. E moves
with the mere scale of the weights, so it comes with the same analysis on weights rescaled to step
0's RMS, on shuffled weights, and on Gaussian weights of equal mean and standard deviation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from l2e.analysis.analysis import Analysis, Options, option
from l2e.analysis.figures import Panel, Panels, colours, over_steps
from l2e.analysis.multifractal import MOMENTS, Spectrum, spectrum
from l2e.analysis.tables import Table
from l2e.progress import Progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from l2e.analysis.interaction import ModelWeights
    from l2e.analysis.series import SeriesCheckpoint
    from l2e.analysis.subject import Subject

CONTROLS = ("rescaled", "shuffled", "gaussian")


@dataclass(frozen=True)
class NeuroMFAOptions(Options):
    networks: int = option(10, "sampled networks a checkpoint, seeds 0, 1, ...", least=1)
    sample: int = option(64, "nodes a set, s", least=1)
    threshold: int = option(150, "longest distance kept, T", least=2, most=100_000)
    hops: int = option(1, "edges of a path", least=1, most=64)
    layout: str = option(
        "per_head",
        "rows of GPT-NeoX's fused q, k, v: as they are, or flat as published",
        choices=("per_head", "flat"),
    )


def measure(subject: Subject, options: NeuroMFAOptions) -> dict:
    return measure_series(subject.series, options)


def measure_series(series: list[SeriesCheckpoint], options: NeuroMFAOptions) -> dict:
    """The numbers of the checkpoints by step; those of one without a step alone."""
    from l2e.analysis.interaction import open_weights

    if not series:
        raise ValueError("no checkpoints: name those of a series")
    steps: dict[int | None, str] = {}
    for one in series:
        if one.step in steps:
            raise ValueError(
                f"{steps[one.step]} and {one.name} are both of step {one.step}; a series is of "
                "one run"
            )
        steps[one.step] = one.name
    ordered = sorted(series, key=lambda one: one.step or 0)
    return analyze_neuromfa([open_weights(one) for one in ordered], options)


def analyze_neuromfa(
    checkpoints: list[ModelWeights], options: NeuroMFAOptions, progress: bool = True
) -> dict:
    """The numbers for a series of checkpoints of one model.

    Raises ValueError if the checkpoints differ in shape or none of them yields a spectrum. Without
    a checkpoint of step 0, E and the rescaled control are None, with the reason.
    """
    from l2e.analysis.interaction import draw_samples, sampled_network

    first = checkpoints[0]
    for other in checkpoints[1:]:
        if other.architecture != first.architecture:
            raise ValueError(
                f"{other.name} is {other.architecture}, but {first.name} is {first.architecture}; "
                "a series must be of one model"
            )
    start = next((c for c in checkpoints if c.step == 0), None)
    samples = [
        draw_samples(first.architecture, options.sample, seed) for seed in range(options.networks)
    ]
    origin = None
    if start is not None:
        origin = [sampled_network(start, sample, options.layout) for sample in samples]
    measured = [
        _measure(checkpoint, samples, origin, options)
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


def _measure(checkpoint: ModelWeights, samples, origin, options: NeuroMFAOptions) -> dict:
    """All variants of one checkpoint, averaged over its networks."""
    from l2e.analysis.interaction import node_counts, sampled_network

    spectra: dict[str, list] = {"trained": []} | {name: [] for name in CONTROLS}
    norms, degrees = [], []
    for seed, sample in enumerate(samples):
        network = sampled_network(checkpoint, sample, options.layout)
        random = np.random.default_rng(seed)
        variants = {
            "trained": network,
            "shuffled": shuffled(network, random),
            "gaussian": gaussian(network, random),
        }
        if origin is not None:
            variants["rescaled"] = rescaled(network, origin[seed])
        for name, matrices in variants.items():
            counts = node_counts(matrices, options.threshold, options.hops)
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


def _entry(checkpoint: ModelWeights, measured: dict, base: dict | None) -> dict:
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


CONTROL_COLOURS = {"rescaled": "tab:orange", "shuffled": "tab:green", "gaussian": "tab:red"}


def panels(result: dict) -> Panels:
    """Spectra f(alpha), and alpha_0, w and E over steps with the controls."""
    rows = [row for row in result["checkpoints"] if row["alpha_0"] is not None]

    def spectra(axes: Axes) -> None:
        lines, steps = [], []
        for row, colour in zip(rows, colours("viridis", len(rows), 0.95), strict=True):
            lines += axes.plot(row["alpha"], row["f"], color=colour)
            steps.append(row["name"] if row["step"] is None else f"step {row['step']:,}")
        axes.set_xlabel("α")
        axes.set_ylabel("f(α)")
        columns = 1 + len(rows) // 17
        axes.legend(
            lines, steps, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=11, ncols=columns
        )

    found = Panels([Panel("neuromfa_spectra", spectra, width=9)])
    stepped = [row for row in rows if row["step"] is not None]
    if len(stepped) < 2:
        return found
    steps = [row["step"] for row in stepped]

    def line(key: str, label: str) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            values = _gaps([row[key] for row in stepped])
            axes.errorbar(
                steps,
                values,
                [row.get(f"{key}_std") or 0 for row in stepped],
                marker="o",
                capsize=3,
                label="trained (± spread of the networks)",
            )
            for name, colour in CONTROL_COLOURS.items():
                axes.plot(
                    steps,
                    _gaps([row["controls"][name][key] for row in stepped]),
                    "--",
                    color=colour,
                    label=name,
                )
            over_steps(axes)
            axes.set_ylabel(label)
            axes.legend(fontsize=11)

        return draw

    return Panels(
        [
            *found,
            Panel("neuromfa_alpha0", line("alpha_0", "irregularity α₀")),
            Panel("neuromfa_width", line("w", "heterogeneity w")),
            Panel("neuromfa_emergence", line("E", "degree of emergence E")),
        ]
    )


def _gaps(values: list[float | None]) -> np.ndarray:
    """The values with NaN, which leaves a gap in a line, for those that are missing."""
    return np.array(values, dtype=float)


def notes(result: dict) -> list[str]:
    return [
        "E moves with the mere scale of the weights. Read it beside the same analysis on "
        "weights rescaled to step 0's RMS, and on shuffled and Gaussian weights: an E that "
        "they share is no sign of structure."
    ]


def tables(result: dict) -> list[Table]:
    head = ["step", "α₀", "w", "E", "± networks", "E rescaled", "E shuffled", "E Gaussian"]
    head += ["R²", "kept nodes", "weight norm"]
    rows = [
        [
            f"{row['step']:,}" if row["step"] is not None else row["name"],
            *(row.get(key) for key in ("alpha_0", "w", "E", "E_std")),
            *(row["controls"][name]["E"] for name in CONTROLS),
            *(row.get(key) for key in ("fit_r2", "kept_nodes", "weight_norm")),
        ]
        for row in result["checkpoints"]
    ]
    return [Table(head, rows)]


def points(result: dict) -> list[dict[str, float | None]]:
    """alpha_0, w and E of each checkpoint, and E of the weights rescaled to step 0's RMS."""
    return [
        {
            "$\\alpha_0$": row["alpha_0"],
            "w": row["w"],
            "E": row["E"],
            "E, weights rescaled": row["controls"]["rescaled"]["E"],
        }
        for row in result["checkpoints"]
    ]


ANALYSIS = Analysis(
    name="neuromfa",
    title="Self-organisation (NeuroMFA)",
    help="self-organisation over checkpoints: alpha_0, w, E and their controls",
    on=("checkpoints",),
    options=NeuroMFAOptions,
    measure=measure,
    panels=panels,
    notes=notes,
    tables=tables,
    points=points,
)
