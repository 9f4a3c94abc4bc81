"""Run an experiment: arms x seeds, each run once, and say what can be concluded.

    python launch/experiment.py configs/experiments/tiny.json --output runs/tiny
    python launch/experiment.py configs/experiments/study.json --dry-run
    python launch/experiment.py configs/experiments/study.json --output runs/study --workers 12
    python launch/experiment.py configs/experiments/study.json --output runs/study --slurm job.sh
    python launch/experiment.py report runs/tiny

Finished runs are skipped and interrupted ones go on, so the same command may be given again at
any time. `report` may be, too: it says what is missing.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.cli import path, run_verb, verb_parser, whole

if TYPE_CHECKING:
    from launch.comparison.plan import Experiment, PlannedRun


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["report"]:
        return report(report_parser().parse_args(words[1:]).folder)
    options = parser().parse_args(words)
    if options.output is None and not options.dry_run:
        parser().error("give --output DIR, the experiment's folder, or --dry-run")
    from launch.comparison import plan

    output = options.output or Path("runs") / options.plan.stem
    if not options.dry_run:
        refuse_unfit(output, options.slurm)
    experiment = plan.read(options.plan, output, not options.no_control)
    if options.dry_run:
        from launch.comparison.preview import lines

        print("\n".join(lines(experiment, options.workers)))
        return 0
    return run(experiment, options)


def refuse_unfit(output: Path, job: Path | None) -> None:
    """Raise ValueError where a folder is no experiment's, or a job cannot be written."""
    from launch.comparison import record

    taken = [name for name in record.FOLDERS if (output / name).exists()]
    if taken and not (output / record.NAME).exists():
        raise ValueError(
            f"--output {output}: holds {' and '.join(taken)}, which are no experiment's "
            f"({record.NAME} is missing); name a new folder"
        )
    if job is not None and (job.is_dir() or not job.absolute().parent.is_dir()):
        raise ValueError(f"--slurm {job}: no file can be written there; name one in a folder")


def run(experiment: Experiment, options: argparse.Namespace) -> int:
    """Train what is not finished yet, then write the page."""
    from launch.comparison import record, workers
    from launch.comparison.plan import not_alike
    from launch.training import data
    from launch.training.provenance import git_commit

    commit = git_commit()
    warnings = [*not_alike(experiment), *record.check_folder(experiment, options.output, commit)]
    for warning in warnings:
        print(f"warning: {warning}", flush=True)
    record.write(experiment, options.output, commit)
    left = [run for run in experiment.runs if not run.finished]
    print(f"{len(experiment.runs) - len(left)} of {len(experiment.runs)} runs are finished")
    if left:
        if options.slurm is not None:
            return write_job(left, options.slurm, experiment.program)
        for one in {run.arm: run for run in left}.values():
            data.fetch(one.config, one.folder)  # once, before the runs ask for it side by side
        how = partial(train, program=experiment.program)
        outcome = workers.train_all(left, options.workers, how, say)
        if outcome.stopped:
            say("stopped; the same command goes on from here")
            return 130
        if outcome.failed:
            say(f"{len(outcome.failed)} runs failed; the same command tries them again")
    return report(options.output) or int(any(not run.finished for run in experiment.runs))


def write_job(left: list[PlannedRun], path: Path, program: Path | None) -> int:
    """An array job of the runs that are left, one GPU each."""
    from launch.planning.jobs import slurm
    from launch.training import data

    for one in {run.arm: run for run in left}.values():
        data.fetch(one.config, one.folder)
    base = str(left[0].base)
    options = argparse.Namespace(config=base, nodes=1, gpus_per_node=1, time="24:00:00")
    text = slurm(options, [run.task for run in left], str(program or "launch/pretrain.py"))
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path}, an array of {len(left)} runs: sbatch it from the repository's root")
    return 0


def train(arguments: list[str], program: Path | None = None) -> None:
    """One run, by `pretrain.py` or the plan's own program; its process may train another one
    afterwards."""
    if program is not None:
        load_program(program).main(arguments)
        return
    from launch import pretrain
    from launch.engine.layout import release_layout

    try:
        pretrain.main(arguments)
    finally:
        release_layout()


def load_program(path: Path) -> ModuleType:
    """The module in a plan's own program."""
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None, "the plan's check has seen to the file"
    assert spec.loader is not None, "and to its ending"
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def say(message: str) -> None:
    print(message, flush=True)


def report(folder: Path) -> int:
    """Say what an experiment's folder tells, of whatever runs are finished."""
    try:
        from launch.comparison import findings
        from launch.comparison.page import write_page
    except ModuleNotFoundError as missing:  # scipy, matplotlib: training went without
        print(
            f"no page: {missing.name} is not installed here; the runs are safe. Install it "
            f"(pip install {missing.name}), then: python launch/experiment.py report {folder}",
            file=sys.stderr,
        )
        return 1
    found = findings.find(folder)
    print(findings.summary(found))
    print(write_page(folder, found))
    return 0


def parser() -> argparse.ArgumentParser:
    result = verb_parser(__doc__, prog="experiment.py")
    result.add_argument("plan", type=path, metavar="PLAN.json", help="arms, seeds, comparison")
    result.add_argument("--output", type=path, metavar="DIR", help="its folder")
    result.add_argument(
        "--workers",
        type=whole(1),
        default=1,
        metavar="N",
        help="runs at once on this machine, on one core each and dealt out over its GPUs "
        "(default 1)",
    )
    result.add_argument(
        "--slurm",
        type=path,
        metavar="FILE",
        help="write an array job of the runs that are left, and train none of them here",
    )
    result.add_argument(
        "--dry-run",
        action="store_true",
        help="check the plan, print runs, tokens, time and the difference it can detect, and stop",
    )
    result.add_argument(
        "--no-control",
        action="store_true",
        help="go without the arms 'none' and 'silence', and so without what their gain is worth",
    )
    return result


def report_parser() -> argparse.ArgumentParser:
    result = verb_parser(
        "Write an experiment's page from what is there.", prog="experiment.py report"
    )
    result.add_argument("folder", type=path, metavar="DIR", help="the experiment's folder")
    return result


if __name__ == "__main__":
    run_verb(main)
