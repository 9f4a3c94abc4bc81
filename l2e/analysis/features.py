"""Feature datasets: passages partitioned by a human-readable feature."""

import gzip
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class FeatureSet:
    """Passages and, for each, the index of its feature in `names`.

    labels: int64 [passages].
    """

    name: str
    texts: list[str]
    labels: np.ndarray
    names: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def counts(self) -> dict[str, int]:
        return dict(zip(self.names, np.bincount(self.labels).tolist(), strict=True))

    def sample(self, per_feature: int, seed: int = 0) -> "FeatureSet":
        """At most `per_feature` random passages of each feature, in the file's order."""
        random = np.random.default_rng(seed)
        kept = []
        for label in range(len(self.names)):
            rows = np.flatnonzero(self.labels == label)
            kept.append(random.permutation(rows)[:per_feature])
        return self.subset(np.sort(np.concatenate(kept)))

    def subset(self, rows: np.ndarray) -> "FeatureSet":
        """The passages `rows`; every feature must keep at least one."""
        left = np.bincount(self.labels[rows], minlength=len(self.names))
        if not left.all():
            gone = ", ".join(n for n, c in zip(self.names, left, strict=True) if not c)
            raise ValueError(
                f"{self.name}: no usable passage of feature {gone} is left. Remove the feature "
                "or skip fewer tokens (--skip)"
            )
        return FeatureSet(
            self.name, [self.texts[row] for row in rows], self.labels[rows], self.names
        )

    def digest(self) -> str:
        """A hash of all texts and labels, in order."""
        state = hashlib.blake2b(digest_size=16)
        state.update(json.dumps([self.names, self.labels.tolist(), self.texts]).encode())
        return state.hexdigest()


def read_features(path: str | Path) -> FeatureSet:
    """Read JSON lines {"text", "feature"}, plain or gzipped. Empty passages are left out, aloud.

    Raises ValueError for a missing file, a malformed line, or fewer than two features.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"feature file {path} does not exist")
    texts, features, empty = [], [], []
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                text, feature = record["text"], record["feature"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f'{path}, line {number}: expected {{"text": ..., "feature": ...}}, '
                    f"found {line.strip()[:80]!r}"
                ) from error
            if not text.strip():
                empty.append(number)
                continue
            texts.append(text)
            features.append(feature)
    if empty:
        print(f"{path}: {len(empty)} empty passages left out (first: line {empty[0]})")
    return make_features(path.name.split(".")[0], texts, features)


def make_features(name: str, texts: list[str], features: list[str]) -> FeatureSet:
    """A feature set from texts and their features' names, the features sorted by name."""
    names = sorted(set(features))
    if len(names) < 2:
        raise ValueError(
            f"{name}: {len(names)} feature(s) found ({', '.join(names)}); monosemanticity compares "
            "features, so at least two are needed"
        )
    index = {feature: i for i, feature in enumerate(names)}
    return FeatureSet(name, texts, np.array([index[feature] for feature in features]), names)
