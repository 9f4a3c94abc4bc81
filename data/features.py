"""Feature sets for the analyses: passages, each of one human-readable feature.

A feature is a sub-folder, a file ending, or the value of a field of the records. Every feature
gets equally many passages, none twice; a document gives a few of them at most, and lies wholly
in the "train" or wholly in the "test" split.
"""

import gzip
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data.corpus import Fields, Source, look_over, read_units
from data.folders import why_no_corpus
from data.formats import TEXT, compression_of
from data.records import Reject, parse
from l2e.files import replacing
from l2e.problems import Problem

TRAIN_SHARE = 0.7


@dataclass(frozen=True)
class FeaturePreparation:
    """What to build.

    `by` is "folder", "extension" or "field"; `label` names the field. `groups` puts endings
    together, {"Perl": [".pl", ".pm"]}; the endings in no group are then left out.
    """

    inputs: list[str]
    by: str
    label: str = "feature"
    groups: Mapping[str, list[str]] = field(default_factory=dict)
    passages: int = 500
    characters: int = 600
    per_document: int = 5
    seed: int = 42


class Document(NamedTuple):
    feature: str
    name: str
    text: str


def build_features(what: FeaturePreparation, output: Path) -> dict:
    """Write lines {"text", "feature", "source", "split"} to `output`, gzipped where it ends in .gz.

    Returns the counts: passages and documents of each feature, the features left out because they
    have too few, and what was passed over on the way, by its reason. Raises ValueError where fewer
    than two features are left.
    """
    kept: dict[str, list[dict]] = {}
    seen: set[bytes] = set()
    passed_over: Counter[str] = Counter()

    def is_full(feature: str) -> bool:
        return len(kept.get(feature, ())) == what.passages

    for document in _documents(what, is_full, passed_over):
        passages = kept.setdefault(document.feature, [])
        taken = 0
        for text in cut_passages(document.text, what.characters):
            digest = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()
            if taken == what.per_document or is_full(document.feature):
                break
            if digest in seen:
                continue
            seen.add(digest)
            taken += 1
            split = _split_of(document.name, what.seed)
            row = {"text": text, "feature": document.feature, "source": document.name}
            passages.append({**row, "split": split})
    full = {name: rows for name, rows in sorted(kept.items()) if is_full(name)}
    left_out = {name: len(rows) for name, rows in kept.items() if name not in full}
    if len(full) < 2:
        counts = ", ".join(f"{name} {len(rows)}" for name, rows in kept.items()) or "none"
        raise Problem(
            "--passages",
            what.passages,
            f"fewer than two features have so many ({counts})",
            "ask for fewer passages, or give more input",
        )
    write(output, full)
    documents = {name: len({row["source"] for row in rows}) for name, rows in full.items()}
    return {
        "passages": what.passages,
        "documents": documents,
        "left_out": left_out,
        "passed_over": dict(passed_over),
    }


def _split_of(name: str, seed: int) -> str:
    return "train" if _number("split", name, seed) < TRAIN_SHARE * 2**64 else "test"


def _number(purpose: str, name: str, seed: int) -> int:
    """A number in [0, 2^64) that follows from the name alone, another one for each purpose."""
    key = f"{purpose} {seed} {name}".encode(errors="surrogateescape")
    digest = hashlib.blake2b(key, digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def cut_passages(text: str, characters: int) -> Iterator[str]:
    """Consecutive passages of about so many characters, each ending where a word does."""
    start = 0
    while start < len(text):
        stop = start + characters
        while stop < len(text) and not text[stop].isspace() and stop < start + 1.25 * characters:
            stop += 1
        passage = text[start:stop].strip()
        if len(passage) >= characters / 2:
            yield passage
        start = stop


def _documents(
    what: FeaturePreparation, is_full: Callable[[str], bool], passed_over: Counter[str]
) -> Iterator[Document]:
    """Documents with their features: files in an order without meaning, records as they come.

    Files of a feature that `is_full` aren't read. What else isn't used is counted by its reason.
    """
    if what.by == "field":
        fields = Fields(subset=what.label)
        found = look_over(what.inputs)
        passed_over.update({reason: len(names) for reason, names in found.passed_over.items()})
        for unit in read_units(found.sources, fields):
            record = parse(unit, fields)
            if isinstance(record, Reject):
                passed_over[record.reason.split(":")[0]] += 1
            elif not record.subset:
                passed_over[f"no text in the field {what.label!r}"] += 1
            else:
                yield Document(record.subset, f"{record.source}#{record.line}", record.text)
        return
    for feature, path in _labelled_files(what, passed_over):
        if not is_full(feature):
            source = Source(str(path), TEXT, compression_of(path.name))
            for unit in read_units([source], Fields()):
                record = parse(unit, Fields())
                if isinstance(record, Reject):
                    passed_over[record.reason.split(" at ")[0]] += 1
                else:
                    yield Document(feature, str(path), record.text)


def _labelled_files(what: FeaturePreparation, passed_over: Counter[str]) -> list[tuple[str, Path]]:
    """(feature, file) of every file below the folders, in the order of their names' hashes."""
    endings = {ending: name for name, group in what.groups.items() for ending in group}
    labelled = []
    for folder in map(Path, what.inputs):
        if not folder.is_dir():
            raise Problem("--input", folder, "no such folder", "name a folder of files")
        for place, folders, names in os.walk(folder):
            reasons = {
                name: why_no_corpus(name) or ("a link" if Path(place, name).is_symlink() else "")
                for name in [*folders, *names]
            }
            passed_over.update(filter(None, reasons.values()))
            folders[:] = [name for name in folders if not reasons[name]]
            inside = Path(place).relative_to(folder).parts
            for name in (name for name in names if not reasons[name]):
                if what.by == "folder":
                    feature = inside[0] if inside else ""
                else:
                    ending = Path(name).suffix
                    feature = endings.get(ending, "") if endings else ending
                path = Path(place, name)
                if feature and path.is_file():
                    labelled.append((feature, path))
    return sorted(labelled, key=lambda pair: _number("order", str(pair[1]), what.seed))


def write(output: Path, features: Mapping[str, list[dict]]) -> None:
    """All passages, feature by feature; the file appears whole or not at all."""
    lines = (
        json.dumps(row, ensure_ascii=False) + "\n" for rows in features.values() for row in rows
    )
    content = "".join(lines).encode()
    # No time stamp: the same input gives the same bytes.
    content = gzip.compress(content, mtime=0) if output.suffix == ".gz" else content
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(output) as file:
            file.write(content)
    except OSError as error:
        reason = f"can't be written ({error})"
        raise Problem("--output", output, reason, "free space, or choose another place") from error
