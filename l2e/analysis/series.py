"""A series of checkpoints: which step each is of, told before anything is measured."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from l2e.hub import parse

# step1000, step_0001000, global_step1000, checkpoint-500, ckpt500, iter_0005000, step=7
STEP = re.compile(r"(?:steps?|checkpoint|ckpt|iter(?:ation)?)[-_=]?(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class SeriesCheckpoint:
    """name: as the user wrote it. step: None if its name holds none. run: what it belongs to, the
    folder around it or the id before @. source: where it lies in Hugging Face form, or its id."""

    name: str
    step: int | None
    run: str
    source: str


def read_series(
    names: list[str], in_hugging_face_form: Callable[[str], str] = str
) -> list[SeriesCheckpoint]:
    """The checkpoints `names`, in the order given.

    Raises ValueError where one of several has no step, or two of a run have the same; before any
    of them is brought into Hugging Face form, except those whose name holds no step.
    """
    # A run's folder stands for its newest checkpoint, whose name is known when it is opened.
    sources = {name: in_hugging_face_form(name) for name in names if named_step(name) is None}
    steps = [named_step(sources.get(name, name)) for name in names]
    runs = [run_of(name) for name in names]
    unnamed = [name for name, step in zip(names, steps, strict=True) if step is None]
    if unnamed and len(names) > 1:
        raise ValueError(
            f"no step in the name of {unnamed[0]}: the checkpoints of a series need names whose "
            "last part is such as step1000, step_0001000, checkpoint-1000 or id@step1000"
        )
    taken: dict[tuple[str, int | None], str] = {}
    for name, step, run in zip(names, steps, runs, strict=True):
        if (run, step) in taken:
            raise ValueError(
                f"{taken[run, step]} and {name} are the same step of one run, {step}; name one"
            )
        taken[run, step] = name
    return [
        SeriesCheckpoint(name, step, run, sources.get(name) or in_hugging_face_form(name))
        for name, step, run in zip(names, steps, runs, strict=True)
    ]


def named_step(name: str) -> int | None:
    """The step in the last part of a name: step1000, run2/checkpoint-500, pythia-70m@step512."""
    found = STEP.findall(_around_and_last(name)[1])
    return int(found[-1]) if found else None


def run_of(name: str) -> str:
    """What a checkpoint's name says of its run: the folder around it, or the id before @; a run's
    own folder is itself."""
    return name if named_step(name) is None else _around_and_last(name)[0]


def _around_and_last(name: str) -> tuple[str, str]:
    """A path's folder and last part; an id and its revision."""
    path, revision = parse(name)
    return (path, revision) if revision else (str(Path(path).parent), Path(path).name)
