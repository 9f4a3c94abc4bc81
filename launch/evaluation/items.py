"""A folder of local task files, and the items that they hold."""

import io
import json
import re
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from l2e.files import once
from l2e.streams import GZIP, open_streams

# Official file names that differ from the harness's task names.
FILE_STEMS = {"wsc": "wsc_superglue"}
SPLIT_FILE = re.compile(
    r"(?P<stem>.+?)_(?P<split>train|validation|test|dev)(_subset\d+)?\.jsonl(\.gz)?$"
)
BIG_BENCH_FILE = re.compile(r"bigbench(_.*)?\.jsonl(\.gz)?$")
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
    if not file.is_file():  # a pipe would be waited for
        raise ValueError(f"{file}: is no regular file; put the items into one")
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
