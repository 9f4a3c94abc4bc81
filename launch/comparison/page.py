"""An experiment's page: one HTML file with its figures inside; report.json has its numbers."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

import numpy as np

from l2e.analysis.tables import Table
from launch.comparison.figures import draw_curves, draw_differences, draw_worth
from launch.comparison.plan import Plan
from launch.comparison.readouts import EQUAL_TIME, LAST_MEASURED, WORTH
from launch.comparison.record import changed
from launch.comparison.statistics import interval

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 74rem; margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; display: block; margin: 1rem 0; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ccc; text-align: right; }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; }
.note { color: #555; }
.answer { font-size: 1.15rem; border-left: .3rem solid #888; padding-left: 1rem; }
pre { background: #f3f3f3; padding: .6rem; overflow-x: auto; font-size: .85rem; }
"""
# What the arms' tables show: a readout's title, and how its numbers are written.
LOSSES = {
    "validation_loss": ("validation loss", "{:.4f}"),
    "bits_per_byte": ("bits/byte", "{:.4f}"),
    WORTH: ("worth", "{:+.4f}"),
    "step_seconds": ("seconds/step", "{:.4f}"),
    "training_seconds": ("seconds", "{:.0f}"),
}
LAYERS = {
    "std": ("std", "{:.3g}"),
    "kurtosis": ("kurtosis", "{:.3g}"),
    "mean_ms": ("mean MS", "{:.3f}"),
    "mlp_to_residual": ("MLP / residual", "{:.3f}"),
    "selected_fraction": ("selected", "{:.2%}"),
    "gradient_ratio": ("gradient ratio", "{:.3g}"),
    "fkr": ("FKR", "{:.2%}"),
    "ks": ("K-S", "{:.3f}"),
}
READOUTS = LOSSES | LAYERS | {EQUAL_TIME: ("validation loss at equal time", "{:.4f}")}
NOTES = f"""Means over the finished seeds, &plusmn; their standard deviation; of layers the mean
over the inhibited ones, and of what training logs the mean over the last {LAST_MEASURED} measured
steps. <i>Worth</i>: the rise of the validation loss when the MLPs of these layers are removed from
the finished model. Where it is nothing, the layers were switched off, whatever their activations
look like. <i>FKR</i> (at k = 2 %) and <i>K-S</i>: of the finished model on the plan's feature set;
of layers that are switched off they mean nothing. <i>Gradient ratio</i>: L_MS's gradient over the
language model's at the site."""
EQUAL_TIME_NOTE = """Of each pair of runs, when the faster one ends; between two evaluations on the
line from the one to the other. A run's pace is the median of its steps, without validation and
saving. Runs side by side share their machine: the pace is what it was there, not alone. The
learning rate was laid out for all steps: a run that is cut short had not come down yet."""


def write_page(folder: Path, found: dict[str, Any]) -> Path:
    """Write report.json, the figures and report.html; returns the page's path."""
    numbers = folder / "report.json"
    numbers.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    plan = Plan.model_validate(found["plans"][-1]["plan"])
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        f"<title>{text(plan.question)}</title><style>{STYLE}</style>",
        f"<h1>{text(plan.question)}</h1>",
        *(f"<p class='answer'>{text(line)}</p>" for line in answer(plan, found)),
        *missing(found),
        "<h2>The arms against each other</h2>",
        *(comparison(plan, found, against, figures) for against in found["differences"]),
        "<h2>Each arm</h2>",
        arms_tables(plan, found),
        f"<p class='note'>{NOTES}</p>",
        layers_table(found),
        picture(draw_worth(plan, found, figures / "worth.png")),
        "<h2>At equal time</h2>",
        times_table(found),
        f"<p class='note'>{EQUAL_TIME_NOTE}</p>",
        "<h2>Other readouts</h2>",
        "<p class='note'>Paired over seeds, 95 % t-intervals, Holm's correction over the arms of "
        "one readout; nothing corrects for the number of readouts.</p>",
        *(others(plan, found, against) for against in found["differences"]),
        *scores(found),
        "<h2>Over steps</h2>",
        picture(draw_curves(plan, found, figures / "curves.png")),
        "<p class='note'>Lines are means over seeds, bands from the lowest to the highest. Arms "
        "are compared in the sections above, at the last step alone.</p>",
        "<h2>How it was made</h2>",
        *origin(found),
    ]
    page = folder / "report.html"
    page.write_text("\n".join(parts) + "\n</html>\n", encoding="utf-8")
    return page


def text(value: object) -> str:
    return html.escape(str(value))


def answer(plan: Plan, found: dict[str, Any]) -> list[str]:
    """The primary comparison in a sentence, and the same arm against silence."""
    lines = []
    for against, table in found["differences"].items():
        told = table.get(plan.primary.readout, {}).get(plan.primary.arm)
        if told is None:
            lines.append(f"{plan.primary.arm} - {against}: no seed has both yet.")
            continue
        power = ""
        if told["detectable"] is not None:
            power = f" Detectable with these seeds: {told['detectable']:.4f}."
        lines.append(
            f"{plan.primary.arm} - {against}, {plan.primary.readout}: {interval(told)}, "
            f"{told['seeds']} seeds: {told['verdict']}. What matters: "
            f"{plan.smallest_difference:g}.{power}"
        )
    return lines


def missing(found: dict[str, Any]) -> list[str]:
    """What is not there yet."""
    lines = []
    if found["missing"]:
        arms = [f"{arm} ({', '.join(map(str, seeds))})" for arm, seeds in found["missing"].items()]
        told = f"{text('; '.join(arms))}. All that is said is without them."
        lines.append(f"<p><b>Not finished:</b> {told}</p>")
    lines += [f"<p><b>Not alike:</b> {text(told)}.</p>" for told in found["unlike"]]
    for name, reason in found["damaged"].items():
        lines.append(f"<p><b>Left out:</b> {text(name)}: {text(reason)}</p>")
    for readout, arms in found["without"].items():
        told = f"The plan asks for {readout}; runs of {', '.join(arms)} do not tell it."
        lines.append(f"<p><b>Not measured:</b> {text(told)}</p>")
    return lines


def comparison(plan: Plan, found: dict[str, Any], against: str, figures: Path) -> str:
    """All arms minus one: the figure and the table."""
    told = found["differences"][against].get(plan.primary.readout, {})
    if not told:
        return f"<p>No arm has a seed in common with {text(against)} yet.</p>"
    path = draw_differences(plan, told, against, figures / f"minus_{against}.png")
    head = ["arm", "difference [95 %]", "sd", "seeds", "p", "p (Holm)", "detectable", "verdict"]
    rows = [
        [
            arm, interval(one), number(one["deviation"]), str(one["seeds"]), number(one["p"]),
            number(one["p_holm"]), number(one["detectable"]), one["verdict"],
        ]
        for arm, one in told.items()
    ]  # fmt: skip
    note = (
        f"{plan.primary.readout} minus {against}'s, paired over seeds; 95 % t-intervals, Holm's "
        f"correction over these {len(rows)} arms; the band is what does not matter "
        f"(&plusmn;{plan.smallest_difference:g})."
    )
    return f"{picture(path)}<p class='note'>{note}</p>{table(head, rows)}"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def table(head: list[str], rows: list[list[str]]) -> str:
    return f"<div class='wide'>{Table(head, rows)._repr_html_()}</div>"


def arms_tables(plan: Plan, found: dict[str, Any]) -> str:
    """What each arm came to: its losses, and what its layers do."""
    controls = [
        f"<li>{text(arm.name)} is there to rule out {text(arm.control_for)}</li>"
        for arm in plan.arms
        if arm.control_for
    ]
    return f"<ul>{''.join(controls)}</ul>{arms_table(found, LOSSES)}{arms_table(found, LAYERS)}"


def arms_table(found: dict[str, Any], columns: dict[str, tuple[str, str]]) -> str:
    shown = {
        name: column
        for name, column in columns.items()
        if any(name in one for seeds in found["arms"].values() for one in seeds.values())
    }
    rows = []
    for arm, seeds in found["arms"].items():
        if not seeds:
            continue
        row = [arm, str(len(seeds))]
        for name, (_, form) in shown.items():
            values = [one[name] for one in seeds.values() if name in one]
            cell = form.format(np.mean(values)) if values else ""
            if len(values) > 1:
                cell += "\u00a0±\u00a0" + form.replace("+", "").format(np.std(values, ddof=1))
            row.append(cell)
        rows.append(row)
    return table(["arm", "seeds", *(title for title, _ in shown.values())], rows)


def layers_table(found: dict[str, Any]) -> str:
    """What is known of single layers, means over seeds; folded up."""
    rows = []
    for arm, seeds in found["arms"].items():
        names = {name: None for one in seeds.values() for name in one if ", block " in name}
        blocks: dict[int, dict[str, float]] = {}
        for name in names:
            figure, _, block = name.partition(", block ")
            known = [one[name] for one in seeds.values() if name in one]
            blocks.setdefault(int(block), {})[figure] = float(np.mean(known))
        rows += [(arm, block, figures) for block, figures in sorted(blocks.items())]
    figures = {figure: None for *_, known in rows for figure in known}
    if not figures:
        return ""
    cells = [
        [arm, str(block), *(f"{known[name]:.4g}" if name in known else "" for name in figures)]
        for arm, block, known in rows
    ]
    head = ["arm", "block", *(title_of(name) for name in figures)]
    return f"<details><summary>Layer by layer</summary>{table(head, cells)}</details>"


def times_table(found: dict[str, Any]) -> str:
    """What a step of each arm took, and its loss at equal time against the others'."""
    rows = []
    for arm, seeds in found["arms"].items():
        if paces := [1000 * one["step_seconds"] for one in seeds.values() if "step_seconds" in one]:
            told = [table_.get(EQUAL_TIME, {}).get(arm) for table_ in found["differences"].values()]
            spread = f"{min(paces):.1f} to {max(paces):.1f}"
            rows.append([arm, spread, *(interval(one) if one else "" for one in told)])
    minus = [f"validation loss minus {against}'s [95 %]" for against in found["differences"]]
    return table(["arm", "ms/step, its runs'", *minus], rows)


def others(plan: Plan, found: dict[str, Any], against: str) -> str:
    """All arms minus one in the readouts beside the primary one; folded up."""
    told = found["differences"][against]
    names = list(dict.fromkeys(plan.readouts)) or [name for name in READOUTS if name in told]
    rows = [
        [title_of(name) if place == 0 else "", arm, interval(one, "+.3g"), str(one["seeds"]),
         number(one["p_holm"])]
        for name in names
        if name in told and name != plan.primary.readout
        for place, (arm, one) in enumerate(told[name].items())
    ]  # fmt: skip
    if not rows:
        return ""
    title = f"minus {against}"
    shown = table(["readout", title, "difference [95 %]", "seeds", "p (Holm)"], rows)
    opened = " open" if against == plan.primary.against else ""
    return f"<details{opened}><summary>{text(title)}</summary>{shown}</details>"


def title_of(name: str) -> str:
    """A readout as the tables' heads call it."""
    return READOUTS[name][0] if name in READOUTS else name


def scores(found: dict[str, Any]) -> list[str]:
    """Downstream scores of each arm, and its differences over seeds and items together."""
    seeds = [one for arm in found["arms"].values() for one in arm.values()]
    tasks = list({name: None for one in seeds for name in one if name.endswith("-shot")})
    if not tasks:
        return []
    rows = []
    for arm, runs in found["arms"].items():
        known = [[one[task] for one in runs.values() if task in one] for task in tasks]
        if any(known):
            rows.append([arm, *(f"{100 * np.mean(k):.2f}" if k else "" for k in known)])
    parts = ["<h2>Downstream</h2>", table(["accuracy (%)", *tasks], rows)]
    for against, arms in found["scores"].items():
        rows = [
            [arm, *(interval(told[task], "+.2f", 100) if task in told else "" for task in tasks)]
            for arm, told in arms.items()
        ]
        parts.append(table([f"minus {against} (points)", *tasks], rows))
    note = "Mean [95 %] of what other seeds and other items would say, both resampled."
    return [*parts, f"<p class='note'>{note}</p>"]


def origin(found: dict[str, Any]) -> list[str]:
    """Plan, commit, versions, machine, date."""
    first, *later = found["plans"]
    rows = [[name, "; ".join(values)] for name, values in found["provenance"].items() if values]
    rows.append(["plan", f"sha256 {first['sha256']}, first started {first['started']}"])
    if files := first.get("files"):
        named = [f"{name} sha256 {digest}" for name, digest in files.items()]
        rows.append(["its files", "; ".join(named)])
    lines = "".join(f"<li>{text(name)}: {text(value)}</li>" for name, value in rows)
    parts = [f"<ul>{lines}</ul>"]
    for plan in later:
        differing = changed(first, plan)
        parts.append(
            f"<p><b>The plan was changed after the first run:</b> sha256 {plan['sha256']}, "
            f"started {plan['started']}, another {text(', '.join(differing))}.</p>"
        )
    if len(found["provenance"]["commit"]) > 1:
        parts.append("<p><b>Runs of several commits are compared here.</b></p>")
    plan_text = json.dumps(found["plans"][-1]["plan"], indent=1)
    parts.append(f"<details><summary>The plan</summary><pre>{text(plan_text)}</pre></details>")
    parts.append("<p class='note'>Every number is in report.json beside this page.</p>")
    return parts


def picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f"<img alt='{text(path.stem)}' src='data:image/png;base64,{data}'>"
