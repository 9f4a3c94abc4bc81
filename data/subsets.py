"""PREFIX.subsets: which subset of a corpus each document is from."""

from pathlib import Path

import numpy as np

from data import manifest


class Subsets:
    """Names of the documents' subsets; all empty for token files that another tool made."""

    def __init__(self, prefix: str | Path):
        self.names = list((manifest.read(prefix) or {}).get("subsets", {})) or [""]
        path = Path(f"{prefix}.subsets")
        # A corpus of one subset has no such file.
        self.numbers = np.memmap(path, np.int32, "r") if path.exists() else None

    def name_of(self, document: int) -> str:
        """The subset a document is from."""
        return self.names[0 if self.numbers is None else int(self.numbers[document])]

    def number_of_each(self, documents: int) -> np.ndarray:
        """Every document's subset, as a number into `names` [documents]."""
        return np.zeros(documents, np.int32) if self.numbers is None else self.numbers
