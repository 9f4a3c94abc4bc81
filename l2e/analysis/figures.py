"""The papers' figures, each drawn from a verb's result and saved as a PNG."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

STYLE: Any = {
    "font.size": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
CONTROL_COLOURS = {"rescaled": "tab:orange", "shuffled": "tab:green", "gaussian": "tab:red"}


def save(path: Path, draw: Callable[[Axes], None], width: float = 8, height: float = 5) -> Path:
    """One figure of one panel, as a PNG of `width` by `height` inches."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(width, height))
        draw(axes)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=100)
        plt.close(figure)
    return path


def draw_scale(result: dict, folder: Path) -> list[Path]:
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
        axes.set_xticks(at, [*names, "10 random\nneurons"], rotation=45, ha="right")
        axes.axvline(len(names) - 0.5, color="grey", linewidth=1)
        axes.set_ylabel("Monosemantic Scale $\\phi$")
        axes.set_xlabel("feature whose ten best-probing neurons (dots) are averaged")
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
            label="mean $\\phi_{l^*}$ ± standard error",
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
            ["mean $\\phi_{l^*}$ ± standard error", "K-S"],
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

    paths = [
        save(folder / "scale_layers.png", profile),
    ]
    if result["top"]:
        paths.append(save(folder / "scale_monosemantic.png", against, width=10))
        paths.append(save(folder / "scale_example.png", example, width=10))
    return paths


def draw_fkr(result: dict, folder: Path) -> list[Path]:
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

    return [save(folder / "fkr_curve.png", curve), save(folder / "fkr_layers.png", layers)]


def draw_probe(result: dict, folder: Path) -> list[Path]:
    """F1 of the best probe by number of neurons, and single neurons against their controls."""
    features = list(result["always_yes_f1"])

    def sizes(axes: Axes) -> None:
        colours = plt.get_cmap("tab20")(np.linspace(0, 1, len(features)))
        for feature, colour in zip(features, colours, strict=True):
            rows = [row for row in result["sizes"] if row["feature"] == feature]
            axes.plot(
                [r["k"] for r in rows], [r["f1"] for r in rows], "o-", color=colour, label=feature
            )
        axes.set_xscale("log", base=2)
        ticks = sorted({row["k"] for row in result["sizes"]})
        axes.set_xticks(ticks, ticks)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("neurons in the probe (best layer)")
        axes.set_ylabel("F1 on held-out passages")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=11)

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

    return [
        save(folder / "probe_sizes.png", sizes, width=10),
        save(folder / "probe_single.png", single, width=10),
    ]


def draw_ablate(result: dict, folder: Path) -> list[Path]:
    """The rise of the loss by feature, each neuron a row, above the random neurons' largest."""
    features = list(result["loss"])

    def heat(axes: Axes) -> None:
        rows = [*result["neurons"], *result["random"]]
        values = np.array([[row["increase_percent"][f] for f in features] for row in rows])
        limit = max(np.abs(values).max(), 1e-9)
        image = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        axes.set_xticks(range(len(features)), features, rotation=45, ha="right")
        axes.set_yticks(range(len(rows)), [row["neuron"] for row in rows], fontsize=11)
        axes.axhline(len(result["neurons"]) - 0.5, color="black", linewidth=2)
        axes.set_title(
            f"Activation replaced ({result['how']}); below the line: random neurons", fontsize=13
        )
        axes.grid(False)
        axes.figure.colorbar(image, label="increase of the loss (%)")

    count = len(result["neurons"]) + len(result["random"])
    return [save(folder / "ablate.png", heat, width=10, height=2.5 + 0.3 * count)]


def draw_decrease(result: dict, folder: Path) -> list[Path]:
    """Decrease ratio of each method, with two standard errors over batches."""
    arms = result["arms"]

    def bars(axes: Axes) -> None:
        means = [arm["decrease_ratio_percent"] for arm in arms.values()]
        errors = [2 * arm["decrease_ratio_error"] for arm in arms.values()]
        axes.bar(list(arms), means, yerr=errors, capsize=5, width=0.6)
        axes.axhline(0, color="black", linewidth=1)
        axes.set_ylabel("mean decrease of MS after one step (%)")

    return [save(folder / "decrease.png", bars)]


def draw_proxies(result: dict, folder: Path) -> list[Path]:
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

    return [save(folder / "proxies.png", correlations, width=7)]


def draw_neuromfa(result: dict, folder: Path) -> list[Path]:
    """Spectra f(alpha), and alpha_0, w and E over steps with the controls."""
    rows = [row for row in result["checkpoints"] if row["alpha_0"] is not None]

    def spectra(axes: Axes) -> None:
        colours = plt.get_cmap("viridis")(np.linspace(0, 0.95, len(rows)))
        for row, colour in zip(rows, colours, strict=True):
            step = row["name"] if row["step"] is None else f"step {row['step']:,}"
            axes.plot(row["alpha"], row["f"], color=colour, label=step)
        axes.set_xlabel("$\\alpha$")
        axes.set_ylabel("$f(\\alpha)$")
        axes.legend(
            loc="center left", bbox_to_anchor=(1, 0.5), fontsize=11, ncols=1 + len(rows) // 17
        )

    paths = [save(folder / "neuromfa_spectra.png", spectra, width=9)]
    stepped = [row for row in rows if row["step"] is not None]
    if len(stepped) < 2:
        return paths
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
            axes.set_xscale("symlog", linthresh=1)
            axes.set_xlim(left=-0.2)
            axes.set_xlabel("step")
            axes.set_ylabel(label)
            axes.legend(fontsize=11)

        return draw

    return [
        *paths,
        save(folder / "neuromfa_alpha0.png", line("alpha_0", "irregularity $\\alpha_0$")),
        save(folder / "neuromfa_width.png", line("w", "heterogeneity $w$")),
        save(folder / "neuromfa_emergence.png", line("E", "degree of emergence $E$")),
    ]


def _gaps(values: list[float | None]) -> np.ndarray:
    """The values with NaN, which leaves a gap in a line, for those that are missing."""
    return np.array(values, dtype=float)


def draw_trajectory(result: dict, folder: Path) -> list[Path]:
    """Each measure over steps, a line a model size, the range over seeds as a band."""
    paths = []
    measures = list(dict.fromkeys(line["measure"] for line in result["lines"]))
    for number, measure in enumerate(measures):

        def draw(axes: Axes, measure: str = measure) -> None:
            for line in result["lines"]:
                if line["measure"] != measure or not line["points"]:
                    continue
                steps = [point["step"] for point in line["points"]]
                label = f"{line['parameters'] / 1e6:.3g} M parameters"
                seeds = max(point["seeds"] for point in line["points"])
                if seeds > 1:
                    label += f", {seeds} seeds"
                (drawn,) = axes.plot(steps, [p["mean"] for p in line["points"]], "o-", label=label)
                axes.fill_between(
                    steps,
                    [point["low"] for point in line["points"]],
                    [point["high"] for point in line["points"]],
                    color=drawn.get_color(),
                    alpha=0.25,
                )
            axes.set_xscale("symlog", linthresh=1)
            axes.set_xlim(left=-0.2)
            axes.set_xlabel("step")
            axes.set_ylabel(measure)
            axes.legend()

        paths.append(save(folder / f"trajectory_{number}.png", draw))
    return paths
