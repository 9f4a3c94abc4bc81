"""A token file of random documents: enough to time reading and training, with no download."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.index import bin_path, idx_path, write_index


def write_random_tokens(prefix: Path, tokens: int, vocab_size: int) -> Path:
    """Write `prefix`.bin and .idx with `tokens` uint16 tokens in 1000 documents of one length."""
    generator, documents = np.random.default_rng(0), 1000
    length = tokens // documents
    values = generator.integers(0, vocab_size, size=length * documents, dtype=np.uint16)
    values.tofile(bin_path(prefix))
    write_index(idx_path(prefix), np.dtype(np.uint16), np.full(documents, length))
    return prefix
