"""Hold two or more runs side by side: losses, monosemanticity, scores; or check their equality.

    python launch/compare.py runs/baseline runs/l2e --output runs/comparison
    python launch/compare.py runs/one_gpu runs/eight_gpus --equal
    python launch/compare.py runs/base_* runs/l2e_* --arms 3

Reads `metrics.jsonl`, `results/*.json` and, for --equal, the newest checkpoint both have. Writes
comparison.json and PNG figures. With --arms N the first N runs are seeds of one arm, the others of
the second, in the same order: differences are then paired over seeds, with an interval. Two runs
alone are one seed, whatever their steps do: their losses get none. `experiment.py` runs and
compares whole families of arms.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.cli import number, path, run_verb, verb_parser, whole

if TYPE_CHECKING:
    from launch.comparison.runs import RecordedRun

# Published tolerance: equal runs in float32 agree this well after any number of ranks (relative).
TOLERANCE = 1e-5


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    from launch.comparison import comparison  # slow to import; --help should not wait
    from launch.comparison.runs import read_run

    runs = [read_run(folder) for folder in options.runs]
    for place, folder in enumerate(options.runs):
        if any(folder.resolve() == other.resolve() for other in options.runs[:place]):
            raise ValueError(f"{folder}: is named twice; a run is compared with others")
    if len(runs) < 2:
        raise ValueError(f"{options.runs[0]}: name at least two runs to compare")
    if options.equal:
        return tell_differences(runs, options.tolerance)
    if options.arms is not None and options.arms * 2 != len(runs):
        raise ValueError(
            f"--arms {options.arms}: {len(runs)} runs were named; give {options.arms} of each arm"
        )
    output = options.output or runs[0].folder / "results" / "comparison"
    output.mkdir(parents=True, exist_ok=True)
    report = comparison.compare(runs, options.arms)
    (output / "comparison.json").write_text(json.dumps(report, indent=1) + "\n")
    from launch.comparison.plots import draw

    print(comparison.table(report))
    for figure in draw(runs, output):
        print(figure)
    print(output / "comparison.json")
    return 0


def tell_differences(runs: list[RecordedRun], tolerance: float) -> int:
    """Exit status 1 if any run leaves the first one's tolerance."""
    from launch.comparison.comparison import first_difference

    status = 0
    for other in runs[1:]:
        told = first_difference(runs[0], other, tolerance)
        print(f"{runs[0].folder} and {other.folder}: {told or 'equal'} (tolerance {tolerance:g})")
        status = status or int(told is not None)
    return status


def parser() -> argparse.ArgumentParser:
    result = verb_parser(__doc__, prog="compare.py")
    result.add_argument("runs", nargs="+", type=path, metavar="RUN", help="folders of runs")
    result.add_argument(
        "--output", type=path, metavar="DIR", help="default: RUN/results/comparison"
    )
    result.add_argument("--arms", type=whole(1), metavar="N", help="seeds in each of two arms")
    result.add_argument(
        "--equal",
        action="store_true",
        help="name the first step and tensor that differ by more than the tolerance; exit status 1",
    )
    result.add_argument(
        "--tolerance",
        type=number(0),
        default=TOLERANCE,
        metavar="R",
        help="largest relative difference of equal runs (default %(default)s: fp32, any layout)",
    )
    return result


if __name__ == "__main__":
    run_verb(main)
