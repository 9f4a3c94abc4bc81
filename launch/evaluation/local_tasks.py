"""The harness's tasks fed from local files: prompts, choices and metrics stay its own.

Whatever an item lacks is told by its file and line, where the harness would score it as wrong.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from jinja2 import Environment, UndefinedError, meta
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.config.group import GroupConfig
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from launch.evaluation.items import KINDS, NUMBERS, Item, LocalData, MissingFile

# What a task's own functions raise for an item that isn't as they expect it.
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError)


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
