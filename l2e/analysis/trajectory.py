"""Any analysis over steps and model sizes, runs of the same size being seeds of one band."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from l2e.analysis.analysis import Analysis, analyses, option
from l2e.analysis.figures import Panel, Panels, over_steps
from l2e.analysis.neuromfa import NeuroMFAOptions, measure_series
from l2e.analysis.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from l2e.analysis.subject import Subject


def followed() -> tuple[str, ...]:
    """The analyses that can be followed over steps."""
    return tuple(name for name, analysis in analyses().items() if analysis.points)


@dataclass(frozen=True)
class TrajectoryOptions(NeuroMFAOptions):
    measures: Sequence[str] = option(
        ("scale", "fkr"),
        "what to follow over the checkpoints (default: scale fkr); the options on networks are "
        "neuromfa's",
        of=str,
        choices=followed,
        nargs="+",
    )


def measure(subject: Subject, options: TrajectoryOptions) -> dict:
    """Every measure of every checkpoint; those of weights alone run by run."""
    chosen = [analyses()[name] for name in options.measures]
    on_models = [analysis for analysis in chosen if "model" in analysis.on]
    if on_models and not subject.has_features:
        names = " ".join(analysis.name for analysis in on_models)
        raise ValueError(f"measures {names}: give feature passages as well (--features FILE)")
    series = subject.series
    if not series:
        raise ValueError("no checkpoints: name those of a series")
    unnamed = [one.name for one in series if one.step is None]
    if unnamed:
        raise ValueError(f"no step in the name of {unnamed[0]}: a trajectory is over steps")
    points: list[dict] = []
    for one in series:
        model = subject.at(one)
        measures: dict = {}
        for analysis in on_models:
            what = analysis.options(**analysis.while_followed)
            [point] = _points(analysis, analysis.measure(model, what))
            measures |= point
        size = model.network.parameters
        points.append({"name": one.name, "step": one.step, "parameters": size})
        points[-1]["measures"] = measures
    for analysis in chosen:
        if analysis in on_models:
            continue
        for run in dict.fromkeys(one.run for one in series):
            own = sorted((one for one in series if one.run == run), key=lambda one: one.step or 0)
            found = _points(analysis, measure_series(own, options))
            by_name = {one.name: point for one, point in zip(own, found, strict=True)}
            for entry in points:
                entry["measures"] |= by_name.get(entry["name"], {})
    return gather(points)


def _points(analysis: Analysis, values: dict) -> list[dict[str, float | None]]:
    assert analysis.points is not None
    return analysis.points(values)


def gather(points: list[dict]) -> dict:
    """The trajectory's numbers.

    points: {"name", "step", "parameters", "measures"} of each checkpoint. Runs with equally many
    parameters are seeds: of each step their mean and range are given.
    """
    lines = []
    for name in dict.fromkeys(m for point in points for m in point["measures"]):
        for size in sorted({point["parameters"] for point in points}):
            own = [p for p in points if p["parameters"] == size and name in p["measures"]]
            rows = []
            for step in sorted({point["step"] for point in own}):
                values = [p["measures"][name] for p in own if p["step"] == step]
                known = [value for value in values if value is not None]
                if known:
                    spread = {"low": min(known), "high": max(known), "seeds": len(known)}
                    rows.append({"step": step, "mean": float(np.mean(known)), **spread})
            lines.append({"measure": name, "parameters": size, "points": rows})
    return {"lines": lines, "checkpoints": points}


def panels(result: dict) -> Panels:
    """Each measure over steps, a line a model size, the range over seeds as a band."""
    names = list(dict.fromkeys(line["measure"] for line in result["lines"]))
    return Panels(
        [
            Panel(
                f"trajectory_{number}",
                _draw([li for li in result["lines"] if li["measure"] == name]),
            )
            for number, name in enumerate(names)
        ]
    )


def _draw(lines: list[dict]) -> Any:
    def draw(axes: Axes) -> None:
        for line in lines:
            if not line["points"]:
                continue
            steps = [point["step"] for point in line["points"]]
            seeds = max(point["seeds"] for point in line["points"])
            label = _size(line) + (f", {seeds} seeds" if seeds > 1 else "")
            (drawn,) = axes.plot(steps, [p["mean"] for p in line["points"]], "o-", label=label)
            axes.fill_between(
                steps,
                [point["low"] for point in line["points"]],
                [point["high"] for point in line["points"]],
                color=drawn.get_color(),
                alpha=0.25,
            )
        over_steps(axes)
        axes.set_ylabel(_label(lines[0]))
        axes.legend()

    return draw


def _size(line: dict) -> str:
    return f"{line['parameters'] / 1e6:.3g} M parameters"


def _label(line: dict) -> str:
    """A measure's name as it is read; the key is TeX's in files written before."""
    return line["measure"].replace("$\\alpha_0$", "α₀")


def notes(result: dict) -> list[str]:
    runs = max((point["seeds"] for line in result["lines"] for point in line["points"]), default=0)
    seeds = f"the range over {runs} seeds as a band" if runs > 1 else "one seed of each size"
    return [f"{len(result['checkpoints'])} checkpoints, a line a model size, {seeds}."]


def tables(result: dict) -> list[Table]:
    """Each measure at its first and last step: where it began and where it went."""
    rows = []
    for line in result["lines"]:
        if line["points"]:
            first, last = line["points"][0], line["points"][-1]
            ends = [f"{first['step']:,}", first["mean"], f"{last['step']:,}", last["mean"]]
            rows.append([_label(line), _size(line), *ends])
    return [Table(["measure", "model", "first step", "value", "last step", "value"], rows)]


ANALYSIS = Analysis(
    name="trajectory",
    title="Over steps and sizes",
    help="measures over steps and model sizes, seeds as bands",
    on=("checkpoints",),
    optional=("features", "activations"),
    options=TrajectoryOptions,
    measure=measure,
    panels=panels,
    notes=notes,
    tables=tables,
)
