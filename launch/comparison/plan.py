"""An experiment's plan: arms x seeds over one base configuration, what is compared, and by what.

A plan is a JSON file. Its schema is below; `Experiment` is a plan whose every run is known and
has been checked, before the first of them starts.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from configs import Config, load
from configs.schema import Section, key
from data.files import sha256
from l2e.files import once
from l2e.problems import ConfigError
from launch.comparison.likeness import flat_configuration, trained_alike, unlike
from launch.comparison.readouts import problem_with
from launch.planning import cost
from launch.planning.jobs import Task


class Arm(Section):
    """One way to train: the base configuration with some keys changed."""

    name: str = key(
        ..., "the arm's name, and its folder's", pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=100
    )
    overrides: dict[str, Any] = key({}, "configuration keys of this arm, such as l2e.weight")
    control_for: str | None = key(None, "what this arm rules out, in words")
    seeds: int | None = key(None, "how many of the plan's seeds it runs; default: all", ge=1)


class Comparison(Section):
    """Which difference the experiment is about."""

    arm: str = key(..., "the arm that is asked about")
    against: str = key(..., "the arm it is held against; all others are too")
    readout: str = key("validation_loss", "what is compared")


class Plan(Section):
    """An experiment as its author fixed it beforehand."""

    question: str = key(..., "what the experiment is to answer")
    base: str = key(..., "configuration that all arms share, relative to the plan's folder")
    overrides: dict[str, Any] = key({}, "keys changed in all arms")
    program: str | None = key(
        None,
        "Python file whose main(arguments) trains a run as launch/pretrain.py's does, relative to "
        "the plan's folder; default: launch/pretrain.py itself",
    )
    inhibit_fraction_from: str | None = key(
        None,
        "result of `analyze.py fkr` on a checkpoint, relative to the plan's folder: "
        "l2e.inhibit_fraction is the k of its least FKR, unless an override names one",
    )
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = key(
        ..., "seeds of initial weights and data order, the same in all arms", min_length=1
    )
    arms: list[Arm] = key(..., "what is compared", min_length=2)
    primary: Comparison = key(..., "the comparison that answers the question")
    readouts: list[str] = key(
        [],
        "what else every run must tell, each compared over the arms: bits_per_byte, fkr, ks "
        "(these need monitor.features), 'TASK 0-shot' (needs evaluate.tasks), and others that "
        "report.json names",
    )
    smallest_difference: float = key(
        ..., "the smallest difference of the primary readout that matters", gt=0
    )
    deviation: float | None = key(
        None, "standard deviation of a paired difference, of a pilot, for --dry-run", gt=0
    )
    notes: list[str] = key([], "what was decided beforehand, and why")


@dataclass(frozen=True)
class PlannedRun:
    """One run: an arm with a seed.

    Attributes:
        assignments: `key=value`, as pretrain.py's --set takes them.
        config: what they make of the base configuration.
    """

    arm: str
    seed: int
    folder: Path
    base: Path
    assignments: tuple[str, ...]
    config: Config

    @property
    def name(self) -> str:
        return f"{self.arm}, seed {self.seed}"

    @property
    def finished(self) -> bool:
        return (self.folder / "finished").exists()

    @property
    def task(self) -> Task:
        """It as a task of a cluster's job."""
        return Task(str(self.folder), list(self.assignments))

    def arguments(self) -> list[str]:
        """What pretrain.py is called with."""
        return self.task.arguments(str(self.base))


@dataclass(frozen=True)
class Experiment:
    """A checked plan with its runs, in the order in which they start.

    Arms with the most seeds come first, and of these one seed after another: whatever is there
    when time runs out is paired, and speaks of what the experiment is about.
    """

    plan: Plan
    raw: dict[str, Any]
    runs: list[PlannedRun]
    folder: Path  # the plan's, from which it names others
    program: Path | None = None  # what trains a run, if not pretrain.py

    @property
    def hash(self) -> str:
        return plan_hash(self.raw)

    @property
    def files(self) -> dict[str, str]:
        """{key: SHA-256 of what is in the file it names}, of whatever the plan's runs follow from
        beside the plan itself."""
        return {name: sha256(path) for name, path in named_files(self.plan, self.folder).items()}

    def seeds_of(self, arm: Arm) -> list[int]:
        return self.plan.seeds[: arm.seeds]


def plan_hash(raw: dict[str, Any]) -> str:
    """SHA-256 of a plan, whatever its layout on the page."""
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


def read(path: Path, output: Path, control: bool = True) -> Experiment:
    """The experiment in a plan's file, whose runs go to `output`.

    Args:
        control: whether the arms without inhibition and with silenced layers must be there.

    Raises:
        ValueError: lists everything that is wrong with the plan.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=once)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as a plan in JSON ({error})") from None
    return build(raw, path, output, control)


def validated(raw: object, path: Path) -> Plan:
    """The plan that `path` holds. Raises ValueError with everything that is not of the schema."""
    try:
        return Plan.model_validate(raw)
    except ValidationError as report:
        told = [
            f"  {'.'.join(map(str, error['loc'])) or 'the plan'}: {explain(error)}"
            for error in report.errors()
        ]
        raise ValueError("\n".join([f"{path}: {len(told)} errors", *told])) from None


def build(raw: dict[str, Any], path: Path, output: Path, control: bool = True) -> Experiment:
    """The experiment of a plan that has been read from `path`."""
    plan = validated(raw, path)
    problems = list(mistakes(plan))
    program = path.parent / plan.program if plan.program else None
    if program is not None and not (program.is_file() and program.suffix == ".py"):
        problems.append(f"program: {program}: no such Python file")
    runs: list[PlannedRun] = []
    shared: dict[str, list[str]] = {}  # a mistake of the base configuration is every arm's
    with each_warning_once():
        for arm in plan.arms if not problems else []:
            try:
                runs += planned(plan, arm, path.parent, output)
            except ConfigError as error:
                for problem in error.problems:
                    shared.setdefault(str(problem), []).append(arm.name)
            except ValueError as error:
                shared.setdefault(str(error), []).append(arm.name)
    problems += [f"{arms_in_words(plan, names)}: {problem}" for problem, names in shared.items()]
    if not problems:
        problems += unmeasured(plan, runs)
        problems += arms_alike(runs)
        problems += of_other_data(runs)
        problems += controls_missing(runs) if control else []
    if problems:
        lines = [f"  {problem}" for problem in problems]
        raise ValueError("\n".join([f"{path}: {len(lines)} errors", *lines]))
    most = {arm.name: len(plan.seeds[: arm.seeds]) for arm in plan.arms}
    order = {arm.name: place for place, arm in enumerate(plan.arms)}
    runs.sort(key=lambda run: (-most[run.arm], plan.seeds.index(run.seed), order[run.arm]))
    return Experiment(plan, raw, runs, path.parent, program)


def named_files(plan: Plan, folder: Path) -> dict[str, Path]:
    """The files that a plan in `folder` names, by its keys."""
    names = {key: getattr(plan, key) for key in ("base", "program", "inhibit_fraction_from")}
    return {key: folder / name for key, name in names.items() if name}


@contextmanager
def each_warning_once() -> Iterator[None]:
    """Arms share most of their configuration, and what is to be said of it."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in said
        said.add(message)
        return new

    logger = logging.getLogger("configs")
    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)


def arms_in_words(plan: Plan, names: list[str]) -> str:
    if len(names) == len(plan.arms):
        return "all arms"
    return f"arm{'s' if len(names) > 1 else ''} {', '.join(names)}"


def explain(error: Any) -> str:
    """A schema error in the words of a user."""
    if error["type"] == "extra_forbidden":
        return f"unknown key (= {error['input']!r})"
    return f"{error['msg'][0].lower()}{error['msg'][1:]}"


def mistakes(plan: Plan) -> Iterator[str]:
    """What is wrong with a plan by itself."""
    for seed, count in Counter(plan.seeds).items():
        if count > 1:
            yield f"seeds: {seed} is named {count} times; a run repeated is no further evidence"
    names = {arm.name: None for arm in plan.arms}
    alike = Counter(arm.name.casefold() for arm in plan.arms)  # some disks know one case only
    yield from (f"arms: {name!r} names {count} arms" for name, count in alike.items() if count > 1)
    for which in ("arm", "against"):
        if (name := getattr(plan.primary, which)) not in names:
            yield f"primary.{which}: there is no arm {name!r}; there are {', '.join(names)}"
    if plan.primary.arm == plan.primary.against:
        yield f"primary: arm {plan.primary.arm!r} is compared with itself"
    for arm in plan.arms:
        if arm.seeds is not None and arm.seeds > len(plan.seeds):
            yield f"arm {arm.name}: {arm.seeds} seeds, but the plan has {len(plan.seeds)}"
        for name, why in (
            ("train.seed", "is the plan's to set, from its seeds"),
            ("train.stop_after", "leaves runs unfinished, of which nothing is said"),
        ):
            if name in arm.overrides or name in plan.overrides:
                yield f"arm {arm.name}: {name} {why}"


def planned(plan: Plan, arm: Arm, folder: Path, output: Path) -> Iterator[PlannedRun]:
    """An arm's runs, its configuration checked with everything that pretrain.py checks.

    They share one folder of prepared data and index maps.
    """
    base = folder / plan.base
    shared: dict[str, Any] = {"data.cache_dir": str(output / "data")}
    if plan.inhibit_fraction_from is not None:
        shared["l2e.inhibit_fraction"] = k_of_least_fkr(folder / plan.inhibit_fraction_from)
    shared |= plan.overrides | arm.overrides
    config = None
    for seed in plan.seeds[: arm.seeds]:
        keys = shared | {"train.seed": seed}
        assignments = tuple(f"{name}={json.dumps(value)}" for name, value in keys.items())
        config = load(base, assignments, 1) if config is None else with_seed(config, seed)
        own = folder_of(output, arm.name, seed)
        yield PlannedRun(arm.name, seed, own, base, assignments, config)


def k_of_least_fkr(path: Path) -> float:
    """The inhibition level at which a checkpoint's FKR is least, as L2E proposes to choose it.

    Raises:
        ValueError: the file holds no FKR curve, or its least value lies at an end: no minimum.
    """
    try:
        curve = json.loads(path.read_text(encoding="utf-8"))["curve"]
        points = sorted((float(point["k"]), float(point["fkr"])) for point in curve)
        _, k = min((fkr, k) for k, fkr in points)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"inhibit_fraction_from: {path} is no result of `analyze.py fkr` ({error!r})"
        ) from None
    if k in (points[0][0], points[-1][0]):
        raise ValueError(
            f"inhibit_fraction_from: FKR has no minimum in {path}, it is least at an end of what "
            f"was measured, k = {k:.2%} of {points[0][0]:.2%} to {points[-1][0]:.2%}; leave it "
            "out and set l2e.inhibit_fraction"
        )
    return k


def folder_of(output: Path, arm: str, seed: int) -> Path:
    """Where a run lies in its experiment's folder."""
    return output / "runs" / arm / f"seed_{seed}"


def with_seed(config: Config, seed: int) -> Config:
    """The same configuration with another seed, which no check depends on."""
    return config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})


def unmeasured(plan: Plan, runs: list[PlannedRun]) -> Iterator[str]:
    """Readouts that the plan is to compare and that its runs would not tell."""
    for readout in dict.fromkeys([plan.primary.readout, *plan.readouts]):
        told: dict[str, None] = {}
        for run in runs:
            if problem := problem_with(readout, run.config):
                told.setdefault(problem)
        yield from (f"readouts: {readout}: {problem}" for problem in told)


def arms_alike(runs: list[PlannedRun]) -> Iterator[str]:
    """Arms that train the same, whatever else they differ in."""
    seen: dict[str, PlannedRun] = {}
    for run in firsts(runs):
        first = seen.setdefault(trained_alike(run.config), run)
        if first is not run:
            one, other = (flat_configuration(known.config) for known in (first, run))
            keys = [name for name in {**one, **other} if one.get(name) != other.get(name)]
            what = f"train the same: nothing of that depends on {', '.join(keys)}"
            what = what if keys else "are the same configuration"
            yield f"arms {first.arm!r} and {run.arm!r} {what}"


def firsts(runs: list[PlannedRun]) -> list[PlannedRun]:
    """Each arm's first run."""
    return list({run.arm: run for run in reversed(runs)}.values())[::-1]


def of_other_data(runs: list[PlannedRun]) -> Iterator[str]:
    """Arms that would be trained on other data than the first one, whose seeds would not pair."""
    first, *others = firsts(runs)
    for run in others:
        data, tokenizer = first.config.data, first.config.tokenizer
        if (run.config.data.path, run.config.tokenizer) != (data.path, tokenizer):
            yield (
                f"arm {run.arm}: other data.path or tokenizer than {first.arm}'s; runs of other "
                "data say nothing of the arms: give each corpus an experiment of its own"
            )


def not_alike(experiment: Experiment) -> list[str]:
    """What sets the arms' losses apart beside what they ask about."""
    return unlike({run.arm: flat_configuration(run.config) for run in firsts(experiment.runs)})


def controls_missing(runs: list[PlannedRun]) -> Iterator[str]:
    """The two arms without which a gain cannot be read."""
    methods = {run.config.l2e.method for run in runs}
    for method, what in (
        ("none", "nothing to hold the others against"),
        ("silence", "no telling a gain from that of switching the layers off"),
    ):
        if method not in methods:
            yield f"arms: none has l2e.method {method!r}: {what}; add one, or say --no-control"


def tokens(run: PlannedRun) -> int:
    """Tokens that a run trains on."""
    train = run.config.train
    return train.steps * train.global_batch_size * run.config.data.sequence_length


def checkpoint_bytes(run: PlannedRun) -> int:
    """What a run's checkpoints take on the disk: fp32 weights and AdamW's two moments of each."""
    kept = run.config.checkpoint
    at_once = len(kept.steps) + max(1, kept.keep_last if kept.interval else 1)
    if kept.keep_every:
        at_once += run.config.train.steps // kept.keep_every
    return at_once * 12 * cost.parameters(run.config.model)
