"""A run's folder: one process group at a time works in it, and nothing in it is ever lost."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data.files import read_json, sync, write_text
from launch.checkpoint import folders
from launch.checkpoint.canonical import raise_on_all_ranks
from launch.comparison.runs import record_of
from launch.training.run import Claim, Run

CONFIG, MANIFEST, METRICS, FINISHED = "config.json", "manifest.json", "metrics.jsonl", "finished"
CHECKPOINTS, RESULTS, SET_ASIDE = "checkpoints", "results", "set_aside"
FOLDERS = (CHECKPOINTS, RESULTS, SET_ASIDE, "tensorboard", "stacks")
FILES = (CONFIG, MANIFEST, METRICS, FINISHED, "lock", f"{CHECKPOINTS}/{folders.LATEST}")
OUT_OF_THE_WAY = "move it away, or give another folder"
# A result's file says of which step it is.
RESULT_STEP = re.compile(r"_step_(\d+)\.json$")


def refuse_unusable(folder: Path) -> None:
    """Raise ValueError where something is in the way of what a run will write: it may be hours
    until it does."""
    for place in (folder, *(folder / name for name in FOLDERS)):
        if os.path.lexists(place) and not place.is_dir():
            raise ValueError(f"--run-dir {folder}: {place} is no folder; {OUT_OF_THE_WAY}")
        if place.is_dir() and not os.access(place, os.W_OK | os.X_OK):
            raise ValueError(f"--run-dir {folder}: {place} cannot be written to; {OUT_OF_THE_WAY}")
    for place in (folder / name for name in FILES):
        if place.exists() and not place.is_file() and not place.is_char_device():
            raise ValueError(f"--run-dir {folder}: {place} is no file; {OUT_OF_THE_WAY}")


def refuse_taken(folder: Path, resume: str) -> None:
    """A run that starts anew, or from another run's checkpoint, gets a folder without a run.

    Raises ValueError where it holds one.
    """
    checkpoints = folders.checkpoints(folder / CHECKPOINTS)
    if resume == "none":
        found = [name for name in (METRICS, "state.json") if (folder / name).exists()]
        found += [f"{CHECKPOINTS}/{path.name}" for path in checkpoints]
        advice = "go on with it by --resume auto"
    elif resume == "auto" or is_own(folder, resume) or not checkpoints:
        return
    else:
        found = [f"{CHECKPOINTS}/{checkpoints[0].name}"]
        advice = f"--resume {resume} is none of its own checkpoints"
    if found:
        raise ValueError(
            f"--run-dir {folder}: holds a run already ({found[0]}); {advice}, or give another "
            "folder"
        )


def is_own(folder: Path, checkpoint: str | Path | None) -> bool:
    """Whether this is the run itself, or one of the checkpoints of the run as it stands."""
    if checkpoint is None:
        return False
    path = Path(checkpoint).resolve()
    # `checkpoints` may be a link to a larger disk.
    return folder.resolve() == path or (folder / CHECKPOINTS).resolve() == path.parent


@contextmanager
def claimed(folder: Path) -> Iterator[Claim]:
    """The folder is this process group's alone for the length of the block; all ranks call it.

    Raises:
        ValueError: on every rank, where another process has it or it cannot be written.
    """
    claim = Claim(folder)
    raise_on_all_ranks(claim.take, lambda error: cannot_write(folder, error))
    try:
        yield claim
    finally:
        if claim.lock is not None:
            claim.lock.release()


def refuse_lost_beginning(folder: Path, say: Callable[[str], None]) -> None:
    """A run without checkpoints may start over, unless it began from another's.

    Raises ValueError that names where it began.
    """
    before = (read_json(folder / MANIFEST, say) or {}).get("resumed_from")
    if before is not None:
        raise ValueError(
            f"--resume auto: {folder} holds no checkpoint, and its run began from {before}; give "
            f"--resume {before}, or another folder to start from the beginning"
        )


def cannot_write(folder: Path, error: OSError) -> str:
    """What a failing disk means to a user."""
    return f"--run-dir {folder}: cannot be written ({error}); free space, or give another folder"


def begin(run: Run, resume: Path | None, step: int) -> None:
    """Make the folder ready to go on after `step` of the checkpoint `resume`; all ranks call it.

    What lies after `step` is set aside, and an earlier configuration is kept. Nothing of the
    folder has been changed before this.
    """

    def work() -> None:
        if not run.process.is_first:
            return
        own = is_own(run.folder, resume)
        if own:
            assert resume is not None
            folders.point_latest(resume)  # first: a resume that dies in here goes on from there
        for line in set_aside(run.folder, step if own else -1):
            run.say(line)
        (run.folder / FINISHED).unlink(missing_ok=True)
        replace(run.folder / CONFIG, run.config.model_dump_json(indent=2) + "\n")

    raise_on_all_ranks(work, lambda error: cannot_write(run.folder, error))


def set_aside(folder: Path, step: int) -> Iterator[str]:
    """Move the checkpoints, scores and metric lines of later steps to a folder that says so."""
    kept, later, broken = split_metrics(folder / METRICS, step)
    written = json.loads(kept[-1])["step"] if kept else 0
    if written < step:
        yield (
            f"{folder / METRICS}: the lines of steps {written + 1} to {step} are missing; the run "
            "ended before they could be written"
        )
    checkpoints = [
        path for path in folders.checkpoints(folder / CHECKPOINTS) if folders.step_of(path) > step
    ]
    results = [
        path
        for path in sorted((folder / RESULTS).glob("*.json"))
        if (match := RESULT_STEP.search(path.name)) and int(match[1]) > step
    ]
    if not (checkpoints or results or later or broken):
        return
    name = f"after_step_{step:07d}" if step >= 0 else "before_a_new_start"
    place = free(folder / SET_ASIDE / name)
    place.mkdir(parents=True)
    for path in checkpoints + results:
        target = place / path.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        shutil.move(path, target)  # another disk's, where `checkpoints` is a link
    if later or broken:
        write_text(place / METRICS, "".join(later + broken))
        write_text(folder / METRICS, "".join(kept))
    if broken:
        yield f"{folder / METRICS}: {len(broken)} lines cut off or damaged by a crash are left out"
    yield (
        f"set aside, as {place}: {len(checkpoints)} checkpoints, {len(results)} results and "
        f"{len(later)} lines of {METRICS} " + (f"after step {step}" if step >= 0 else "of before")
    )


def split_metrics(path: Path, step: int) -> tuple[list[str], list[str], list[str]]:
    """The lines up to `step`, later ones, and what is no line: a crash cut it, or left zeros."""
    kept: list[str] = []
    later: list[str] = []
    broken: list[str] = []
    text = path.read_text("utf-8", errors="replace") if path.is_file() else ""
    for line in text.split("\n"):
        record = record_of(line)
        part = broken if record is None else kept if record["step"] <= step else later
        if line:
            part.append(line + "\n")
    return kept, later, broken


def replace(path: Path, text: str) -> None:
    """Write a file of the run; one that says something else is kept as NAME.1.json and so on."""
    if path.exists():
        if path.read_bytes() == text.encode():
            return
        path.rename(free(path))
        sync(path.parent)
    write_text(path, text)


def free(path: Path) -> Path:
    """`path` with the next number that nothing bears yet: a.1.json, name.1."""
    numbers = range(1, 10**6)
    named = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in numbers)
    return next(candidate for candidate in named if not candidate.exists())
