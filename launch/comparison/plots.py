"""The comparison's pictures: a curve for each run, one colour a run in all of them."""

from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from launch.comparison.runs import RecordedRun

TITLES = {
    "mean_ms": "mean monosemantic scale",
    "kurtosis": "kurtosis of the activations",
    "std": "standard deviation of the activations",
    "mlp_to_residual": "RMS of the MLP's output over the residual stream's",
    "selected_fraction": "share of activations selected",
}
LAYER_CURVES = ("mean_ms", "kurtosis", "std", "mlp_to_residual")


def draw(runs: list[RecordedRun], folder: Path) -> Iterator[Path]:
    """Write the figures that the runs have data for; yields their paths."""
    names = unique_names(runs)
    yield draw_losses(runs, names, folder / "losses.png")
    if any(run.layers("mean_ms") for run in runs):
        yield draw_layers(runs, names, folder / "layers.png")
    if any(run.scores for run in runs):
        yield draw_scores(runs, names, folder / "scores.png")


def unique_names(runs: list[RecordedRun]) -> list[str]:
    """Folder names, with their parents where two are alike."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    return [f"{run.folder.parent.name}/{run.name}" for run in runs]


def draw_losses(runs: list[RecordedRun], names: list[str], path: Path) -> Path:
    """The losses; below, how far each run's lie from the first one's, where curves overlap."""
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(8, 7), layout="constrained", sharex=True, height_ratios=[3, 2]
    )
    first = compared_losses(runs[0])
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        line = {"color": f"C{number}", "marker": "o", "markersize": 3}
        above.plot(*columns(run.series("lm_loss")), color=f"C{number}", alpha=0.4, linewidth=0.8)
        title = f"{name}, validation" if run.series("validation_loss") else name
        losses = compared_losses(run)
        above.plot(*columns(losses), label=title, **line)
        common = {step: loss - first[step] for step, loss in losses.items() if step in first}
        below.plot(*columns(common), **line)
    above.set_ylabel("loss (nats/token)")
    above.legend()
    below.set_ylabel(f"minus {names[0]}'s (nats/token)")
    below.set_xlabel("step")
    return save(figure, path)


def compared_losses(run: RecordedRun) -> dict[int, float]:
    """Validation losses by step, training losses where there are none."""
    return run.series("validation_loss") or run.series("lm_loss")


def draw_layers(runs: list[RecordedRun], names: list[str], path: Path) -> Path:
    figure, grid = plt.subplots(2, 2, figsize=(11, 7), layout="constrained", sharex=True)
    styles = ["-", "--", ":", "-."]
    for axes, key in zip(grid.flat, LAYER_CURVES, strict=True):
        for number, (run, name) in enumerate(zip(runs, names, strict=True)):
            for place, (layer, values) in enumerate(run.layers(key).items()):
                style = styles[place % len(styles)]
                label = f"{name}, layer {layer}"
                axes.plot(*columns(values), style, color=f"C{number}", label=label)
        axes.set_title(TITLES[key])
    for axes in grid[1]:
        axes.set_xlabel("step")
    grid[0, 0].legend(fontsize="small")
    return save(figure, path)


def draw_scores(runs: list[RecordedRun], names: list[str], path: Path) -> Path:
    tasks = sorted({task for run in runs for task in run.scores})
    figure, axes = plt.subplots(figsize=(max(6, 1.2 * len(tasks)), 5), layout="constrained")
    width = 0.8 / len(runs)
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        places = np.arange(len(tasks)) + (number - (len(runs) - 1) / 2) * width
        scores = [100 * run.scores[task]["score"] if task in run.scores else 0 for task in tasks]
        errors = [
            100 * (run.scores[task]["error"] or 0) if task in run.scores else 0 for task in tasks
        ]
        axes.bar(places, scores, width, yerr=errors, color=f"C{number}", capsize=2, label=name)
    axes.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
    axes.set_ylabel("accuracy (%), bars of one standard error")
    axes.legend()
    return save(figure, path)


def columns(values: dict[int, float]) -> tuple[list[int], list[float]]:
    return list(values), list(values.values())


def save(figure: plt.Figure, path: Path, dpi: int = 120) -> Path:
    figure.savefig(path, dpi=dpi)
    plt.close(figure)
    return path
