"""What an experiment's folder remembers: the plan as it was when the first run started."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from shutil import disk_usage
from typing import Any

from launch.comparison.plan import Experiment, PlannedRun, checkpoint_bytes, plan_hash

NAME = "experiment.json"


def write(experiment: Experiment, output: Path, commit: str | None) -> None:
    """Remember the plan; a plan that has changed since the first start joins the earlier ones."""
    output.mkdir(parents=True, exist_ok=True)
    plans = read(output) if (output / NAME).exists() else []
    if not plans or plan_hash(plans[-1]["plan"]) != experiment.hash:
        now = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "sha256": experiment.hash,
            "git_commit": commit,
            "machine": platform.node(),
            "base": str(experiment.runs[0].base),
            "plan": experiment.raw,
        }
        (output / NAME).write_text(json.dumps([*plans, now], indent=1) + "\n", encoding="utf-8")


def read(output: Path) -> list[dict[str, Any]]:
    """The plans that runs of this folder were started by, the first one first.

    Raises:
        ValueError: the folder holds no experiment.
    """
    path = output / NAME
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{output}: no experiment's folder ({path.name}: {error})") from None


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
    path = run.folder / "config.json"
    if not path.exists():
        return
    there = json.loads(path.read_text(encoding="utf-8"))
    wanted = json.loads(run.config.model_dump_json())
    changed = [
        f"{section}.{name}"
        for section, keys in wanted.items()
        if isinstance(keys, dict)
        for name, value in keys.items()
        if (there.get(section) or {}).get(name, value) != value
    ]
    if changed:
        yield (
            f"{run.name}: the run in {run.folder} was started with another "
            f"{', '.join(changed)}; move it away, or give another --output"
        )


def manifests(runs: list[PlannedRun]) -> dict[str, dict[str, Any]]:
    """{run: its manifest} of the runs that have begun."""
    paths = {run.name: run.folder / "manifest.json" for run in runs}
    return {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name, path in paths.items()
        if path.exists()
    }


def corpus(manifest: dict[str, Any]) -> dict[str, Any]:
    """What of a run's data does not depend on its seed."""
    training = manifest["data"]["training"]
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
    for commit in {manifest["git_commit"] for manifest in manifests(runs).values()} - {now}:
        yield f"runs of commit {commit} are in the folder; this is {now}: the page will say so"


def other_plan(experiment: Experiment, output: Path) -> Iterator[str]:
    if (output / NAME).exists() and (first := read(output)[0])["sha256"] != experiment.hash:
        yield f"the plan is not the one of {first['started']}: the page will say what changed"
