"""An experiment's figures: every seed visible, one colour an arm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from launch.comparison.plan import Plan
from launch.comparison.plots import TITLES, save
from launch.comparison.readouts import WORTH

Curve = dict[int, float]  # a value by step
CURVES = ("std", "kurtosis", "selected_fraction")


def draw_differences(plan: Plan, told: dict[str, Any], against: str, path: Path) -> Path:
    """Every arm a row: its seeds as small dots, their mean and interval."""
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.42 * len(told)), layout="constrained")
    axes.axvspan(-plan.smallest_difference, plan.smallest_difference, color="0.93")
    axes.axvline(0, color="0.6", linewidth=0.8)
    for row, (arm, one) in enumerate(told.items()):
        chosen = arm == plan.primary.arm
        axes.plot(one["values"], [row] * len(one["values"]), "o", color="0.6", markersize=4)
        reach = 0 if one["low"] is None else one["high"] - one["mean"]
        color = "C3" if chosen else "C0"
        axes.errorbar(one["mean"], row, xerr=reach, fmt="D", color=color, capsize=4, markersize=6)
    axes.set_yticks(range(len(told)), [f"{arm} ({one['seeds']})" for arm, one in told.items()])
    axes.set_ylim(len(told) - 0.4, -0.6)  # the first arm on top
    told_of = " (nats/token), lower is better" if plan.primary.readout.endswith("loss") else ""
    axes.set_xlabel(f"{plan.primary.readout} minus {against}'s{told_of}")
    return save(figure, path, dpi=110)


def draw_curves(plan: Plan, found: dict[str, Any], path: Path) -> Path:
    """The validation loss minus the reference's, seed by seed, and what the layers do."""
    against = plan.primary.against
    figure, grid = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained", sharex=True)
    draw_bands(grid[0, 0], losses_minus(found["curves"], against))
    grid[0, 0].set_title(f"validation loss minus {against}'s")
    for axes, name in zip(grid.flat[1:], CURVES, strict=True):
        arms = {
            arm: [one[name] for one in seeds.values() if one.get(name)]
            for arm, seeds in found["curves"].items()
        }
        draw_bands(axes, arms)
        axes.set_title(TITLES[name])
        if name in ("std", "kurtosis"):
            axes.set_yscale("log")
    for axes in grid[1]:
        axes.set_xlabel("step")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside right upper")
    return save(figure, path, dpi=110)


def losses_minus(curves: dict[str, dict[int, Any]], against: str) -> dict[str, list[Curve]]:
    """Each arm's validation losses minus those of the same seed's run of `against`."""
    name, base = "validation_loss", curves[against]
    return {
        arm: [
            {
                step: loss - base[seed][name][step]
                for step, loss in one[name].items()
                if step in base[seed][name]
            }
            for seed, one in seeds.items()
            if seed in base
        ]
        for arm, seeds in curves.items()
    }


def draw_bands(axes: Axes, arms: dict[str, list[Curve]]) -> None:
    """Of each arm a line, the mean over its curves, and a band from the lowest to the highest."""
    for place, (arm, curves) in enumerate(arms.items()):
        if not any(curves):
            continue
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        values = np.array([[curve[step] for step in steps] for curve in curves])
        color, style = f"C{place % 10}", "-" if place < 10 else "--"
        axes.plot(steps, values.mean(0), style, color=color, label=arm, linewidth=1.3)
        axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.12, linewidth=0)


def draw_worth(plan: Plan, found: dict[str, Any], path: Path) -> Path:
    """What the inhibited layers are worth against what the arm gains, every seed a dot."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    against, readout = plan.primary.against, plan.primary.readout
    base = found["arms"][against]
    for place, (arm, seeds) in enumerate(found["arms"].items()):
        both = [
            (one[WORTH], base[seed][readout] - one[readout])
            for seed, one in seeds.items()
            if seed in base and WORTH in one and readout in one and readout in base[seed]
        ]
        if both:
            marker = "o" if place < 10 else "s"
            axes.plot(
                *zip(*both, strict=True), marker, color=f"C{place % 10}", label=arm, alpha=0.8
            )
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set_xlabel("rise of the validation loss without the inhibited MLPs (nats/token)")
    axes.set_ylabel(f"gain over {against} (nats/token)")
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper")
    return save(figure, path, dpi=110)
