"""The harness's tasks: suites by name, with the hub's items or those of local files."""

import contextlib
import io
import logging
import os
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import datasets
import lm_eval.tasks
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict

from l2e.problems import first_line
from launch.evaluation.items import LocalData, MissingFile
from launch.evaluation.local_tasks import build_local

PYTHIA = (
    "sciq",
    "arc_easy",
    "arc_challenge",
    "piqa",
    "lambada_openai",
    "logiqa",
    "winogrande",
    "wsc",
)
BIG_BENCH_LITE = (
    "auto_debugging",
    "bbq_lite_json",
    "code_line_description",
    "conceptual_combinations",
    "conlang_translation",
    "emoji_movie",
    "formal_fallacies_syllogisms_negation",
    "hindu_knowledge",
    "known_unknowns",
    "language_identification",
    "linguistics_puzzles",
    "logic_grid_puzzle",
    "logical_deduction",
    "misconceptions_russian",
    "novel_concepts",
    "operators",
    "parsinlu_reading_comprehension",
    "play_dialog_same_or_different",
    "repeat_copy_logic",
    "strange_stories",
    "strategyqa",
    "symbol_interpretation",
    "vitaminc_fact_verification",
    "winowhy",
)
# Where the suites' tasks lie: reading these folders takes 0.2 s, reading all of them 10 s.
SUITE_FOLDERS = (
    "sciq",
    "arc",
    "piqa",
    "lambada",
    "logiqa",
    "winogrande",
    "super_glue",
    "mmlu/default",
    "bigbench",
)


@dataclass
class Selection:
    """Tasks ready for the harness, and which of a suite's tasks have no local data and why."""

    tasks: TaskDict
    skipped: dict[str, str]


@contextlib.contextmanager
def harness_apart():
    """The harness without its chatter, its processes, and its hand on random states.

    Our own progress goes to `sys.__stderr__`.
    """
    logger, level = logging.getLogger("lm_eval"), logging.getLogger("lm_eval").level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    os.environ["DISABLE_MULTIPROC"] = "1"
    python_state = random.getstate()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        random.setstate(python_state)
        logger.setLevel(level)


@harness_apart()
def select(names: Iterable[str], data: Path | None = None) -> Selection:
    """Resolve task and suite names; read the items from the folder `data` if one is given.

    A suite (`pythia`, `l2e`) leaves out what the folder lacks and reports it; a task asked for by
    name must be there.

    Raises:
        ValueError: unknown task, missing or unreadable file, missing field, no way to the hub.
    """
    named = list(dict.fromkeys(filter(None, map(str.strip, names))))
    manager = task_manager(tuple(named))
    chosen: list[str | Task | Group] = []
    skipped: dict[str, str] = {}
    for name in named:
        members = suite(name, manager)
        for member in members:
            if member not in manager.task_index:
                raise ValueError(unknown_task(member, manager))
            if data is None:
                chosen.append(member)
                continue
            try:
                built = build_local(member, manager, LocalData(data))
            except MissingFile as reason:
                if members == [name]:
                    raise
                skipped[member] = str(reason)
                continue
            chosen += built if isinstance(built, list) else [built]
    if not chosen:
        raise ValueError(f"no task left to run: {'; '.join(skipped.values())}")
    try:
        return Selection(manager.load(chosen), skipped)
    except OSError as error:  # datasets' failures to reach or find something on the hub
        raise ValueError(
            f"tasks {', '.join(named)}: their items cannot be fetched from the hub "
            f"({first_line(error)}); give a folder of local files (--task-data, or "
            "evaluate.task_data in training)"
        ) from None


def suite(name: str, manager: TaskManager) -> list[str]:
    """The tasks a suite stands for; any other name stands for itself."""
    if name == "pythia":
        return list(PYTHIA)
    if name == "l2e":
        return [*PYTHIA, "mmlu", *(big_bench(task, manager) for task in BIG_BENCH_LITE)]
    return [name]


def big_bench(task: str, manager: TaskManager) -> str:
    """Multiple choice where BIG-bench defines choices, else exact match of a generated answer."""
    choice = f"bigbench_{task}_multiple_choice"
    return choice if choice in manager.task_index else f"bigbench_{task}_generate_until"


@cache
def task_manager(names: tuple[str, ...]) -> TaskManager:
    root = Path(lm_eval.tasks.__file__).parent
    quick = TaskManager(
        include_defaults=False, include_path=[root / folder for folder in SUITE_FOLDERS]
    )
    known = set(quick.task_index) | {"pythia", "l2e"}
    return quick if known.issuperset(names) else TaskManager()


def unknown_task(name: str, manager: TaskManager) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, [*manager.all_tasks, "pythia", "l2e"], n=3)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    return f"--tasks: unknown task {name!r}{hint} (`lm-eval ls tasks` lists all)"
