"""Does a knob of L2E travel: is what it does to a layer the same at other sizes and rates?

    python launch/experiment.py report runs/ratio
    python bench/travel.py runs/ratio/report.json --output travel.json

Of an experiment with arms KNOB_SIZE_RATE, among them `none_SIZE_RATE` to divide by, the first seed
of which stands for all. What is done to the inhibited layers is ln(std / std of none), and what is
left of their tails the median kurtosis; a knob's range is the largest less the smallest of these
over the settings (0: it travels). Ranges of two knobs are paired over seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.comparison.statistics import over_seeds

REFERENCE = "none"
READOUTS = {"std": "ln(std / std of none)", "kurtosis": "median kurtosis"}
Effects = dict[str, dict[str, dict[str, float]]]  # by knob, setting and seed


def effects(arms: dict[str, dict[str, Any]], readout: str) -> Effects:
    """What READOUTS says, of every run.

    Raises:
        ValueError: a setting has no finished run of the reference.
    """
    found: Effects = {}
    for name, seeds in arms.items():
        knob, _, setting = name.partition("_")
        if knob == REFERENCE:
            continue
        reference = arms.get(f"{REFERENCE}_{setting}")
        if not reference:
            raise ValueError(f"arm {name}: no finished run of {REFERENCE}_{setting} to divide by")
        by = next(iter(reference.values()))[readout]
        found.setdefault(knob, {})[setting] = {
            seed: math.log(run[readout] / by) if readout == "std" else run[readout]
            for seed, run in seeds.items()
        }
    return found


def ranges(by_setting: dict[str, dict[str, float]]) -> dict[str, float]:
    """How far apart the settings lie, in each seed that all of them have."""
    shared = set.intersection(*(set(seeds) for seeds in by_setting.values()))
    told = {seed: [seeds[seed] for seeds in by_setting.values()] for seed in sorted(shared)}
    return {seed: max(values) - min(values) for seed, values in told.items()}


def travel(arms: dict[str, dict[str, Any]], one: str, other: str) -> dict[str, Any]:
    """Both knobs' effects and ranges, and the paired difference of their ranges."""
    told: dict[str, Any] = {}
    for readout in READOUTS:
        found = effects(arms, readout)
        both = {knob: ranges(found[knob]) for knob in (one, other)}
        seeds = sorted(both[one].keys() & both[other].keys())
        difference = over_seeds([both[one][seed] - both[other][seed] for seed in seeds])
        told[readout] = {"effects": found, "ranges": both, "difference": difference}
    return told


def lines(told: dict[str, Any], one: str, other: str) -> list[str]:
    """The same as text."""
    text = []
    for readout, found in told.items():
        text.append(f"{READOUTS[readout]}: mean over seeds, and each seed's")
        for knob in (one, other):
            for setting, seeds in found["effects"][knob].items():
                values = list(seeds.values())
                each = ", ".join(f"{value:+.2f}" for value in values)
                mean = sum(values) / max(1, len(values))
                text.append(f"  {knob:8} {setting:12} {mean:+.2f}  ({each})")
            values = list(found["ranges"][knob].values())
            each = ", ".join(f"{value:.2f}" for value in values)
            text.append(f"  {knob:8} {'range':12} {sum(values) / len(values):.2f}  ({each})")
        text.append(f"  range of {one} less that of {other}: {found['difference']}")
    return text


def main() -> None:
    """Print the table, and write it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path, help="report.json of the experiment")
    parser.add_argument("--knobs", nargs=2, default=("ratio", "weight"), metavar="KNOB")
    parser.add_argument("--output", type=Path, help="write the numbers as JSON")
    options = parser.parse_args()
    found = json.loads(options.report.read_text(encoding="utf-8"))
    told = travel(found["arms"], *options.knobs)
    print("\n".join(lines(told, *options.knobs)))
    if options.output:
        origin = {"command": " ".join(sys.argv), "provenance": found["provenance"]}
        options.output.write_text(
            json.dumps(origin | told, indent=1, default=vars) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
