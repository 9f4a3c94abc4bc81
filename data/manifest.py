"""PREFIX.manifest.json: what a prepared corpus was made from, and what it holds."""

import json
from pathlib import Path

import numpy as np

from l2e.problems import Problem

# What other parts of the code rely on.
REQUIRED = {
    "documents": int,
    "tokens": int,
    "text_bytes": int,
    "subsets": dict,
    "rejects": dict,
    "bin_sha256": str,
    "idx_sha256": str,
    "tokenizer_path": str,
    "tokenizer_sha256": str,
    "job": dict,
}


def path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.manifest.json")


def read(prefix: str | Path) -> dict | None:
    """The manifest, or None for token files that another tool made.

    Raises ValueError for a damaged one.
    """
    file = path(prefix)
    if not file.exists():
        return None
    if not file.is_file():  # a pipe would be waited for
        raise Problem("manifest", file, "is no regular file", "copy or prepare the corpus anew")
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = f"cannot be read ({error})"
        raise Problem("manifest", file, reason, "copy or prepare the corpus anew") from error
    if not isinstance(content, dict):
        raise Problem("manifest", file, "is no JSON object", "copy or prepare the corpus anew")
    for key, kind in REQUIRED.items():
        if not isinstance(content.get(key), kind):
            reason = f"has no {key!r}, or not as {kind.__name__}"
            raise Problem("manifest", file, reason, "copy or prepare the corpus anew")
    return content


def recorded(prefix: str | Path, key: str) -> str | None:
    """One entry of the manifest, None where there is no manifest."""
    return (read(prefix) or {}).get(key)


class Subsets:
    """PREFIX.subsets: which subset a document is from; all empty for another tool's files."""

    def __init__(self, prefix: str | Path):
        self.names = list((read(prefix) or {}).get("subsets", {})) or [""]
        path = Path(f"{prefix}.subsets")
        # A corpus of one subset has no such file.
        self.numbers = np.memmap(path, np.int32, "r") if path.exists() else None
        documents = (read(prefix) or {}).get("documents")
        if self.numbers is not None and documents not in (None, len(self.numbers)):
            reason = f"counts {len(self.numbers)} documents, its manifest {documents}"
            raise Problem("subsets", path, reason, "copy or prepare the corpus anew")

    def name_of(self, document: int) -> str:
        """The subset a document is from."""
        return self.names[0 if self.numbers is None else int(self.numbers[document])]

    def number_of_each(self, documents: int) -> np.ndarray:
        """Every document's subset, as a number into `names` [documents]."""
        return np.zeros(documents, np.int32) if self.numbers is None else self.numbers
