"""The harness's tasks: suites by name, and the same tasks fed from local JSON-lines files.

Prompts, choices and metrics are always lm-evaluation-harness's own; only the place the items come
from changes.
"""

import contextlib
import io
import json
import logging
import os
import random
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from jinja2 import Environment, UndefinedError, meta
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.config.group import GroupConfig
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.tasks.manager import TaskDict

from l2e.files import once
from l2e.problems import first_line
from l2e.streams import GZIP, open_streams

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
# Official file names that differ from the harness's task names.
FILE_STEMS = {"wsc": "wsc_superglue"}
SPLIT_FILE = re.compile(
    r"(?P<stem>.+?)_(?P<split>train|validation|test|dev)(_subset\d+)?\.jsonl(\.gz)?$"
)
BIG_BENCH_FILE = re.compile(r"bigbench(_.*)?\.jsonl(\.gz)?$")


# What a task's own functions raise for an item that isn't as they expect it.
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError)
# What a field of a record can hold; null is no kind of its own.
KINDS = {
    str: "text",
    int: "a whole number",
    float: "a fraction",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}
NUMBERS = ("a whole number", "a fraction")


@dataclass
class Selection:
    """Tasks ready for the harness, and which of a suite's tasks have no local data and why."""

    tasks: TaskDict
    skipped: dict[str, str]


def select(names: Iterable[str], data: Path | None = None) -> Selection:
    """Resolve task and suite names; read the items from the folder `data` if one is given.

    A suite (`pythia`, `l2e`) leaves out what the folder lacks and reports it; a task asked for by
    name must be there.

    Raises:
        ValueError: unknown task, missing or unreadable file, missing field, no way to the hub.
    """
    with harness_apart():
        return _select(names, data)


def _select(names: Iterable[str], data: Path | None = None) -> Selection:
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


class MissingFile(ValueError):
    """The folder of local data lacks a task's evaluation items."""


class Item(dict[str, Any]):
    """A record, and the file and line it is from."""

    place: str


@dataclass(frozen=True)
class LocalData:
    """A folder of `TASK_SPLIT.jsonl` or `.jsonl.gz` files in the official field names."""

    folder: Path

    def splits(self, task: str) -> dict[str, list[Item]]:
        """{split: items} of one task.

        MMLU subjects share `mmlu_SPLIT` and are told apart by `subject`; BIG-bench tasks share
        `bigbench*.jsonl` and are told apart by `task`.
        """
        if task.startswith("bigbench_"):
            name = re.sub(r"^bigbench_|_(multiple_choice|generate_until)$", "", task)
            return {"default": self._where("task", name, self._big_bench_files())}
        if task.startswith("mmlu_"):
            subject = task.removeprefix("mmlu_")
            files = self._split_files("mmlu")
            return {split: self._where("subject", subject, [file]) for split, file in files.items()}
        stem = FILE_STEMS.get(task, task)
        return {split: read_items(file) for split, file in self._split_files(stem).items()}

    def wanted(self, task: str, split: str) -> str:
        """What `splits` looks for, in words."""
        if task.startswith("bigbench_"):
            return "record of it in bigbench*.jsonl(.gz) (field 'task')"
        if task.startswith("mmlu_"):
            return f"record of it in mmlu_{split}.jsonl(.gz) (field 'subject')"
        return f"{FILE_STEMS.get(task, task)}_{split}.jsonl(.gz)"

    def _split_files(self, stem: str) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for file in sorted(self._files()):
            match = SPLIT_FILE.match(file.name.lower())
            if match and match["stem"] == stem:
                first = found.setdefault(match["split"], file)
                if first is not file:
                    raise ValueError(
                        f"--task-data: {first} and {file} both hold the {match['split']} items of "
                        f"{stem}; keep one of them"
                    )
        return found

    def _big_bench_files(self) -> list[Path]:
        return [file for file in sorted(self._files()) if BIG_BENCH_FILE.match(file.name.lower())]

    def _files(self) -> list[Path]:
        if not self.folder.is_dir():
            raise ValueError(f"--task-data: {self.folder} is not a folder")
        return list(self.folder.iterdir())

    @staticmethod
    def _where(key: str, value: str, files: list[Path]) -> list[Item]:
        return [item for file in files for item in read_items(file) if item.get(key) == value]


@cache
def read_items(file: Path) -> list[Item]:
    """All records of a JSON-lines file, which must have the same fields, each of one kind."""
    items: list[Item] = []
    zipped = file.suffix.lower() in GZIP.endings
    try:
        with file.open("rb") as raw:
            plain = open_streams(raw, GZIP) if zipped else raw
            for number, line in enumerate(io.TextIOWrapper(plain, "utf-8-sig"), 1):
                place = f"{file}, line {number}"
                items.append(read_item(line, place, items[0] if items else None))
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        place = f"{file}, after line {len(items)}"
        raise ValueError(f"{place}: cannot be read ({error}); copy the file anew") from None
    if not items:
        raise ValueError(f"{file}: holds no records")
    return items


def read_item(line: str, place: str, first: Item | None) -> Item:
    """The record of a line, with the fields of the file's first one."""
    try:
        item = json.loads(line, object_pairs_hook=once)
        if "\\u" in line:
            json.dumps(item, ensure_ascii=False).encode()  # half of a surrogate pair has no bytes
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON ({error})") from None
    if not isinstance(item, dict):
        raise ValueError(f"{place}: {KINDS.get(type(item), 'null')}, not a record in {{ }}")
    for name, value in (first or {}).items():
        if name not in item:
            raise ValueError(
                f"{place}: field {name!r} is missing; the first record has {', '.join(first or [])}"
            )
        kinds = [KINDS.get(type(one)) for one in (value, item[name])]
        if None not in kinds and kinds[0] != kinds[1] and not set(kinds) <= set(NUMBERS):
            raise ValueError(
                f"{place}: field {name!r} is {kinds[1]}, and {kinds[0]} in the first record"
            )
    read = Item(item)
    read.place = place
    return read


def build_local(name: str, manager: TaskManager, data: LocalData) -> Task | Group | list[Any]:
    """The harness's task or group `name`, with local items in place of the hub's."""
    entry = manager.task_index[name]
    match entry.kind.name:
        case "TAG":
            return [build_local(task, manager, data) for task in sorted(entry.tags)]
        case "GROUP":
            return local_group(load_yaml(entry.yaml_path), manager, data)
        case _:
            return local_task(load_yaml(entry.yaml_path), data)


def local_group(config: dict[str, Any], manager: TaskManager, data: LocalData) -> Group:
    settings = {key: value for key, value in config.items() if key in GroupConfig.__annotations__}
    group = Group.from_config(GroupConfig(**settings))
    for member in config["task"]:
        built = build_local(member, manager, data)
        for child in built if isinstance(built, list) else [built]:
            group.add(child)
    return group


def local_task(config: dict[str, Any], data: LocalData) -> Task:
    name = config["task"]
    splits = data.splits(name)
    evaluated: str = config.get("test_split") or config["validation_split"]
    if not splits.get(evaluated):
        raise MissingFile(f"{name}: {data.folder} has no {data.wanted(name, evaluated)}")
    for role in ("training_split", "validation_split", "fewshot_split"):
        if config.get(role) not in splits:
            config[role] = None
    if not any(
        config.get(role) for role in ("training_split", "validation_split", "fewshot_split")
    ):
        config["fewshot_split"] = evaluated  # so that the harness shows no item its own answer
    first = splits[evaluated][0]
    used, choices = check_fields(name, config, data.folder, first)
    for item in splits[evaluated]:
        check_item(item, used, choices, first)
    config |= {"custom_dataset": in_memory(splits), "dataset_path": "json", "dataset_name": None}
    settings = {key: value for key, value in config.items() if key != "tag"}
    others = [item for split, items in splits.items() if split != evaluated for item in items]
    return LocalTask(settings, [*splits[evaluated], *others])


class Unscorable(ValueError):
    """An item that the task cannot ask."""


class LocalTask(ConfigurableTask):
    """A task of local items, whose right answers are among their choices.

    The harness itself counts every answer to another item as wrong.
    """

    def __init__(self, config: dict[str, Any], items: list[Item]):
        self.items = items
        try:
            super().__init__(config=config)
        except UNREADABLE as error:
            culprit = first_unreadable(config.get("process_docs"), items)
            raise self.cannot_score(culprit, f"cannot be read as an item ({error})") from None

    def construct_requests(self, doc: dict[str, Any], ctx: str, **settings: Any) -> Any:
        """The harness's requests. Raises ValueError for an item without a right answer."""
        requests = super().construct_requests(doc, ctx, **settings)
        if self.OUTPUT_TYPE == "loglikelihood" and not str(requests.args[1]).strip():
            raise self.cannot_score(doc, "its answer is blank")
        if self.OUTPUT_TYPE == "multiple_choice":
            if any(not str(request.args[1]).strip() for request in requests):
                raise self.cannot_score(doc, "one of its choices is blank")
            if len(requests) < 2:
                raise self.cannot_score(doc, "it has one choice alone, which is always right")
            self.check_answer(doc)
        return requests

    def check_answer(self, doc: dict[str, Any]) -> None:
        """Raise ValueError where an item's right answer is none of its choices."""
        choices = self.doc_to_choice(doc)
        answer = self.doc_to_text(doc) if self.multiple_input else self.doc_to_target(doc)
        for one in answer if isinstance(answer, list) else [answer]:
            if not (0 <= one < len(choices) if isinstance(one, int) else one in choices):
                reason = f"its right answer, {one!r}, is none of its {len(choices)} choices"
                raise self.cannot_score(doc, reason)

    def check_examples(self, shots: int) -> None:
        """Raise ValueError where there are not enough examples to show, or one has no answer."""
        examples = list(self.fewshot_docs())
        if len(examples) <= shots:
            raise ValueError(
                f"{self.config.task}: {shots} examples before each item need more than "
                f"{len(examples)} records; lower --shots, or add a file of training items"
            )
        for doc in examples if self.OUTPUT_TYPE == "multiple_choice" else ():
            self.check_answer(doc)

    def doc_to_text(self, doc: dict[str, Any], *more: Any) -> Any:
        """The harness's prompt. Raises ValueError for an item that has none, as the next two."""
        return self.found(doc, "prompt", super().doc_to_text, *more)

    def doc_to_target(self, doc: dict[str, Any], *more: Any) -> Any:
        return self.found(doc, "right answer", super().doc_to_target, *more)

    def doc_to_choice(self, doc: dict[str, Any], *more: Any) -> list[str]:
        choices = self.found(doc, "choices", super().doc_to_choice, *more)
        if not isinstance(choices, list) or not all(isinstance(one, str) for one in choices):
            raise self.cannot_score(doc, f"its choices, {choices!r:.80}, are no texts")
        return choices

    def found(self, doc: dict[str, Any], what: str, find: Callable[..., Any], *more: Any) -> Any:
        """What the task's template, or its function, finds in an item."""
        try:
            return find(doc, *more)
        except Unscorable:
            raise
        except (*UNREADABLE, SyntaxError, UndefinedError) as error:
            raise self.cannot_score(doc, f"its {what} cannot be found ({error})") from None

    def cannot_score(self, doc: dict[str, Any], reason: str) -> Unscorable:
        def alike(item: Item) -> int:  # the task may have added or changed fields
            return sum(name in doc and doc[name] == value for name, value in item.items())

        place = max(self.items, key=alike).place
        return Unscorable(f"{place}: {reason}; mend or leave out the item")


def first_unreadable(process: Callable[..., object] | None, items: list[Item]) -> Item:
    """The first item of which a task cannot make its own; if each can be, the very first, at which
    the harness looks before any other."""
    for item in items:
        try:
            if process is not None:
                process(datasets.Dataset.from_list([item]))
        except UNREADABLE:
            return item
    return items[0]


def in_memory(splits: dict[str, list[Item]]) -> Callable[..., dict[str, datasets.Dataset]]:
    return lambda **_: {split: datasets.Dataset.from_list(items) for split, items in splits.items()}


def check_item(item: Item, used: set[str], choices: set[str], first: Item) -> None:
    """Raise ValueError for an item that a task can't ask, by the fields that it uses.

    None is null or of another form than in the first item, to which the harness would bring it;
    choices are as many as their labels, and none is empty.
    """
    for name in sorted(used & item.keys()):
        value = item[name]
        lists = [part for part in (value, *parts(value)) if isinstance(part, list)]
        sizes = {len(part) for part in lists} if isinstance(value, dict) else set()
        reason = None
        if value is None or any(None in parts(part) for part in (value, *lists)):
            reason = f"field {name!r} holds null"
        elif any(not part or "" in part for part in lists):
            reason = f"field {name!r} is an empty list or has an empty text in it"
        elif len(sizes) > 1:
            reason = f"field {name!r} has lists of {sorted(sizes)} entries side by side"
        elif form(value) != form(first[name]):
            reason = f"field {name!r} is {form(value)}, and {form(first[name])} in the first record"
        elif name in choices and isinstance(value, str) and not value.strip():
            reason = f"one of its choices is blank, field {name!r}"
        if reason:
            raise ValueError(f"{item.place}: {reason}; mend or leave out the item")


def form(value: Any) -> str:
    """What kind of thing a field holds, and what kinds are in it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {form(value[name])}" for name in sorted(value)) + "}"
    if isinstance(value, list):
        kinds = {"a number" if kind in NUMBERS else kind for kind in map(form, value)}
        return f"a list of {' and '.join(sorted(kinds))}"
    return KINDS.get(type(value), "null")


def parts(value: Any) -> list[Any]:
    """What a list or an object holds."""
    return (
        list(value.values())
        if isinstance(value, dict)
        else value
        if isinstance(value, list)
        else []
    )


def check_fields(
    name: str, config: dict[str, Any], folder: Path, first: Item
) -> tuple[set[str], set[str]]:
    """Every field that the task's prompt, choices and target use is in the records.

    Returns these fields, all of them where the task makes its own fields of the official ones; and
    those of the choices.
    """
    record, process = dict(first), config.get("process_docs")
    if process is not None:  # the task makes its own fields of the official ones
        try:
            record = process(datasets.Dataset.from_list([first]))[0]
        except UNREADABLE as error:
            raise ValueError(
                f"{first.place}: task {name!r} cannot read it ({type(error).__name__}: {error}); "
                f"it has {', '.join(first)}. Take the file in the task's official form"
            ) from None
    choices, prompt, target = (
        fields_read(config.get(f"doc_to_{part}"), record) for part in ("choice", "text", "target")
    )
    used = choices | prompt | target
    if missing := used - record.keys():
        raise ValueError(
            f"{folder}: the records of task {name!r} have no field {sorted(missing)[0]!r}; they "
            f"have {', '.join(record)}. Take the file in the task's official form"
        )
    return used if process is None else set(first), choices


def fields_read(template: Any, record: dict[str, Any]) -> set[str]:
    """The fields that a task's template, or its own function as far as it comes, takes."""
    if callable(template):
        read = Read(record)
        # A failure is told of the item, with its place.
        with contextlib.suppress(*UNREADABLE):
            template(read)
        return read.names
    if isinstance(template, str) and "{{" in template:
        return set(meta.find_undeclared_variables(Environment().parse(template)))
    return {template} & record.keys() if isinstance(template, str) else set()


class Read(dict[str, Any]):
    """A record that remembers the names of the fields it was asked for."""

    def __init__(self, record: dict[str, Any]) -> None:
        super().__init__(record)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)
