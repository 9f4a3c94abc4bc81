"""What an experiment's folder remembers: the plan as it was when the first run started."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from shutil import disk_usage
from typing import Any

from data.files import read_json, write_json
from launch.comparison.likeness import flat_configuration
from launch.comparison.plan import Experiment, PlannedRun, checkpoint_bytes
from launch.comparison.runs import read_configuration

NAME = "experiment.json"
FOLDERS = ("runs", "data")  # beside it


def write(experiment: Experiment, output: Path, commit: str | None) -> None:
    """Remember the plan; one that has changed since the last start, or whose files have, joins the
    earlier ones."""
    output.mkdir(parents=True, exist_ok=True)
    plans = read(output) if (output / NAME).exists() else []
    if not plans or changed(plans[-1], {"plan": experiment.raw, "files": experiment.files}):
        now = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "sha256": experiment.hash,
            "git_commit": commit,
            "machine": platform.node(),
            "base": str(experiment.runs[0].base),
            "files": experiment.files,
            "plan": experiment.raw,
        }
        write_json(output / NAME, [*plans, now])


def read(output: Path) -> list[dict[str, Any]]:
    """The plans that runs of this folder were started by, the first one first.

    Raises:
        ValueError: the folder holds no experiment.
    """
    path = output / NAME
    try:
        plans = json.loads(path.read_text(encoding="utf-8"))
        if not (isinstance(plans, list) and plans and all("plan" in plan for plan in plans)):
            raise ValueError("no list of plans")
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{output}: no experiment's folder ({path.name}: {error})") from None
    return plans


def check_folder(experiment: Experiment, output: Path, commit: str | None) -> list[str]:
    """Hold the folder against the plan before anything starts; what only has to be said.

    Raises:
        ValueError: a run there has another configuration or other data, or the disk is too small.
    """
    problems = [problem for run in experiment.runs for problem in other_configuration(run)]
    problems += other_data(experiment.runs)
    problems += disk_too_small(experiment.runs, output)
    if problems:
        lines = [f"  {problem}" for problem in problems]
        raise ValueError("\n".join([f"{output}: {len(lines)} errors", *lines]))
    return list(other_commits(experiment.runs, commit)) + list(other_plan(experiment, output))


def other_configuration(run: PlannedRun) -> Iterator[str]:
    there, wanted = read_configuration(run.folder / "config.json"), flat_configuration(run.config)
    if there is None:
        return
    # The folder may have been moved, or named otherwise.
    keys = {**wanted, **there}.keys() - {"data.cache_dir"}
    changed = sorted(key for key in keys if there.get(key) != wanted.get(key))
    if changed:
        yield (
            f"{run.name}: the run in {run.folder} was started with another "
            f"{', '.join(changed)}; move it away, or give another --output"
        )


def manifests(runs: list[PlannedRun]) -> dict[str, dict[str, Any]]:
    """{run: its manifest} of the runs that have begun."""
    read = {run.name: read_json(run.folder / "manifest.json") for run in runs}
    return {name: manifest for name, manifest in read.items() if manifest is not None}


def corpus(manifest: dict[str, Any]) -> dict[str, Any]:
    """What of a run's data does not depend on its seed."""
    training = manifest.get("data", {}).get("training", {})
    return {key: value for key, value in training.items() if key.endswith("sha256")}


def other_data(runs: list[PlannedRun]) -> Iterator[str]:
    """Runs whose training set is not the first one's."""
    known = list(manifests(runs).items())
    for name, manifest in known[1:]:
        if corpus(manifest) != corpus(known[0][1]):
            yield (
                f"{name} was trained on another corpus than {known[0][0]}; move one of them away, "
                "or give another --output"
            )


def disk_too_small(runs: list[PlannedRun], output: Path) -> Iterator[str]:
    needed = sum(checkpoint_bytes(run) for run in runs if not run.finished)
    place = next(folder for folder in (output, *output.resolve().parents) if folder.exists())
    if (free := disk_usage(place).free) < needed:
        yield (
            f"the checkpoints of the runs need {needed / 1e9:.1f} GB, and {place} has "
            f"{free / 1e9:.1f} GB free; lower checkpoint.keep_last or checkpoint.steps, or give "
            "an --output on another disk"
        )


def other_commits(runs: list[PlannedRun], now: str | None) -> Iterator[str]:
    """Runs that were trained by other code than would train now."""
    for commit in {manifest.get("git_commit") for manifest in manifests(runs).values()} - {now}:
        yield f"runs of commit {commit} are in the folder; this is {now}: the page will say so"


def other_plan(experiment: Experiment, output: Path) -> Iterator[str]:
    if not (output / NAME).exists():
        return
    first = read(output)[0]
    if differing := changed(first, {"plan": experiment.raw, "files": experiment.files}):
        yield (
            f"the plan is not the one of {first['started']}: another {', '.join(differing)}; the "
            "page will say so"
        )


def changed(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The keys of a plan that two starts differ in, and the files that it names.

    Folders of earlier versions remember no files' hashes: nothing is said of these.
    """
    plans, files = (one["plan"], other["plan"]), (one.get("files"), other.get("files"))
    differing = [key for key in {**plans[0], **plans[1]} if plans[0].get(key) != plans[1].get(key)]
    if files[0] is not None and files[1] is not None:
        names = {**files[0], **files[1]}
        differing += [
            f"{name} (what is in the file)"
            for name in names
            if name not in differing and files[0].get(name) != files[1].get(name)
        ]
    return differing
