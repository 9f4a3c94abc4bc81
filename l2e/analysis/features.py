"""Feature datasets: passages partitioned by a human-readable feature."""

import hashlib
import io
import json
import unicodedata
import zlib
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from l2e.files import once
from l2e.streams import GZIP, open_streams

ZERO = "\0"  # half of each plain letter in UTF-16; no text of ours holds one


@dataclass(frozen=True)
class FeatureSet:
    """Passages and, for each, the index of its feature in `names`.

    labels: int64 [passages]. text_of: which text a passage is, the same number for its copies,
    counted in order of appearance, int64 [passages].
    """

    name: str
    texts: list[str]
    labels: np.ndarray
    names: list[str]
    text_of: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)

    def counts(self) -> dict[str, int]:
        return dict(zip(self.names, np.bincount(self.labels).tolist(), strict=True))

    def sample(self, per_feature: int) -> "FeatureSet":
        """At most `per_feature` random passages of each feature, in the file's order."""
        return self.subset(self.drawn(per_feature, seed=0))

    def drawn(self, per_feature: int | None, seed: int) -> np.ndarray:
        """Random rows of each feature, at most so many or all, ascending."""
        random = np.random.default_rng(seed)
        of_each = (np.flatnonzero(self.labels == label) for label in range(len(self.names)))
        return np.sort(np.concatenate([random.permutation(rows)[:per_feature] for rows in of_each]))

    def subset(self, rows: np.ndarray) -> "FeatureSet":
        """The passages `rows`; every feature must keep at least one."""
        left = np.bincount(self.labels[rows], minlength=len(self.names))
        if not left.all():
            gone = ", ".join(n for n, c in zip(self.names, left, strict=True) if not c)
            raise ValueError(
                f"{self.name}: no usable passage of feature {gone} is left. Remove the feature "
                "or skip fewer tokens (--skip)"
            )
        return replace(
            self,
            texts=[self.texts[row] for row in rows],
            labels=self.labels[rows],
            text_of=distinct(self.text_of[rows].tolist()),
        )

    def digest(self) -> str:
        """A hash of all texts and labels, in order."""
        state = hashlib.blake2b(digest_size=16)
        state.update(json.dumps([self.names, self.labels.tolist(), self.texts]).encode())
        return state.hexdigest()


def read_features(path: str | Path) -> FeatureSet:
    """Read JSON lines {"text", "feature"}, plain or gzipped, UTF-8 with or without a byte order
    mark. Empty passages are left out, aloud; copies and texts of several features are told.

    Raises ValueError for a missing or damaged file, a malformed line, or fewer than two features.
    """
    path = Path(path)
    if not path.is_file():
        reason = "is a folder or no regular file" if path.exists() else "does not exist"
        raise ValueError(f"feature file {path} {reason}")
    texts, features, empty = [], [], []
    for number, line in _lines(path):
        try:
            text, feature = _parse(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        if not text.strip():
            empty.append(number)
            continue
        texts.append(text)
        features.append(feature)
    if empty:
        print(f"{path}: {len(empty)} empty passages left out (first: line {empty[0]})")
    if not texts:
        raise ValueError(f"{path}: holds no passage")
    name = path.name.split(".")[0] or path.name
    found = make_features(name, texts, features)
    _tell_copies(path, found)
    _tell_likeness(path, found.names)
    return found


def read_feature_files(paths: list[str]) -> list[FeatureSet]:
    """Several files, each under a name of its own: of two with the same, the second is NAME-2.

    Raises ValueError for a file that is named twice, and as `read_features` does.
    """
    found: list[FeatureSet] = []
    names: set[str] = set()
    for place, path in enumerate(paths):
        if any(Path(path).resolve() == Path(other).resolve() for other in paths[:place]):
            raise ValueError(f"feature file {path} is named twice")
        features = read_features(path)
        name, number = features.name, 1
        while name.casefold() in names:  # some file systems take A and a for one
            number += 1
            name = f"{features.name}-{number}"
        if number > 1:
            print(f"{path}: called {name}, for another file is {features.name}")
        names.add(name.casefold())
        found.append(replace(features, name=name))
    return found


def _tell_likeness(path: Path, names: list[str]) -> None:
    """Features whose names a reader takes for one, which are measured as several."""
    alike: dict[str, list[str]] = {}
    for name in names:
        shape = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        alike.setdefault(shape, []).append(name)
    for group in alike.values():
        if len(group) > 1:
            shown = ", ".join(map(ascii, group))
            print(f"{path}: the features {shown} differ in case, spaces or Unicode form alone")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The file's lines, numbered from 1. What is no UTF-8 comes as surrogates."""
    number = 0
    with path.open("rb") as file:
        zipped = file.read(2) in GZIP.magic or path.suffix.lower() in GZIP.endings
        file.seek(0)
        opened = open_streams(file, GZIP) if zipped else file
        try:
            for line in io.TextIOWrapper(opened, "utf-8", errors="surrogateescape"):
                number += 1
                yield number, line.removeprefix("\ufeff")
        except (EOFError, zlib.error, OSError) as error:
            raise ValueError(
                f"{path}, line {number + 1}: the gzip file is cut or damaged ({error}); "
                "fetch or write it anew"
            ) from error


def _parse(line: str) -> tuple[str, str]:
    """Text and feature of one line. Raises ValueError with what is wrong."""
    told = f'expected {{"text": ..., "feature": ...}}, found {_shown(line.strip())}'
    if ZERO in line or _surrogates(line):
        raise ValueError(f"{told}: that is no UTF-8 text; convert the file (iconv -t utf-8)")
    try:
        record = json.loads(line, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{told} ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(told)
    values = []
    for key in ("text", "feature"):
        value = record.get(key)
        if not isinstance(value, str):
            found = f"is {_shown(json.dumps(value))}" if key in record else "is missing"
            raise ValueError(f'"{key}" {found}; a string in quotes is needed')
        if _surrogates(value):
            raise ValueError(f'"{key}" holds half of a surrogate pair, which is no character')
        values.append(value)
    text, feature = values
    if not feature.strip():
        raise ValueError('"feature" is empty; a passage needs its feature\'s name')
    return text, feature


def _shown(text: str) -> str:
    return repr(text[:80]) + ("..." if len(text) > 80 else "")


def _surrogates(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text)


def _tell_copies(path: Path, features: FeatureSet) -> None:
    """Said once: passages that repeat a text, and texts that stand under several features."""
    copies = len(features) - len(np.unique(features.text_of))
    if copies:
        pairs = np.unique(np.stack([features.text_of, features.labels]), axis=1)[0]
        several = int((np.bincount(pairs) > 1).sum())
        more = f"; {several} texts stand under more than one feature" if several else ""
        print(f"{path}: {copies} passages are copies of another one{more}")


def distinct(values: Iterable[Hashable]) -> np.ndarray:
    """Equal values' common number, in order of their first appearance, int64 [values]."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.int64)


def make_features(name: str, texts: list[str], features: list[str]) -> FeatureSet:
    """A feature set from texts and their features' names, the features sorted by name."""
    if len(texts) != len(features):
        raise ValueError(
            f"{name}: {len(texts)} texts with {len(features)} features' names; give one of each "
            "for every passage"
        )
    names = sorted(set(features))
    if len(names) < 2:
        raise ValueError(
            f"{name}: {len(names)} feature(s) found ({', '.join(names)}); monosemanticity compares "
            "features, so at least two are needed"
        )
    index = {feature: i for i, feature in enumerate(names)}
    labels = np.array([index[feature] for feature in features])
    return FeatureSet(name, texts, labels, names, distinct(texts))
