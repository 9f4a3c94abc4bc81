"""What a prepared corpus holds: subsets, lengths, duplicates, and whether it is intact."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data import manifest
from data.check import check_manifest
from data.index import TokenFile
from data.manifest import Subsets
from l2e.problems import Problem


def describe_corpus(prefix: str) -> Iterator[str]:
    """Lines about the token files at `prefix`. Raises ValueError where they are damaged."""
    file = TokenFile(prefix)
    yield (
        f"{prefix}: {len(file):,} documents, {len(file.tokens):,} tokens ({file.dtype}), "
        f"{_integrity(file)}"
    )
    yield from _by_subset(file, Subsets(prefix))
    yield from _by_length(file.lengths)
    yield _duplicates(file)


def _integrity(file: TokenFile) -> str:
    if manifest.read(file.prefix) is None:
        return "no manifest to hold it against"
    check_manifest(file, whole=True)
    return "as its manifest says"


def _by_subset(file: TokenFile, subsets: Subsets) -> Iterator[str]:
    numbers = subsets.number_of_each(len(file))
    if len(numbers) != len(file) or int(numbers.max(initial=0)) >= len(subsets.names):
        raise Problem(
            "subsets",
            Path(f"{file.prefix}.subsets"),
            "don't fit the index",
            "prepare the corpus anew",
        )
    documents = np.bincount(numbers, minlength=len(subsets.names))
    # Sums of int32 lengths in float64 are exact below 2^53 tokens.
    tokens = np.bincount(numbers, file.lengths, minlength=len(subsets.names)).astype(np.int64)
    yield f"\n{'subset':<24}{'documents':>12}{'tokens':>16}{'share':>8}{'tokens/document':>17}"
    for number in np.argsort(-tokens, kind="stable"):
        share = tokens[number] / max(1, tokens.sum())
        mean = tokens[number] / max(1, documents[number])
        name = subsets.names[number] or "(none)"
        yield f"{name:<24}{documents[number]:>12,}{tokens[number]:>16,}{share:>8.1%}{mean:>17,.0f}"


def _by_length(lengths: np.ndarray) -> Iterator[str]:
    """A histogram with bins that double."""
    bins = np.bincount(np.frexp(lengths.astype(np.float64))[1])
    yield f"\n{'tokens':<24}{'documents':>12}"
    for power in np.flatnonzero(bins):
        name = "0" if not power else f"{2 ** (power - 1):,} to {2**power - 1:,}"
        bar = "#" * int(np.ceil(40 * bins[power] / bins.max()))
        yield f"{name:<24}{bins[power]:>12,}  {bar}"


def _duplicates(file: TokenFile) -> str:
    """Documents whose tokens all occur, in the same order, in an earlier document."""
    hashes = np.empty(len(file), np.uint64)
    for document in range(len(file)):
        digest = hashlib.blake2b(file.read(document).tobytes(), digest_size=8)
        hashes[document] = int.from_bytes(digest.digest(), "little")
    _, first = np.unique(hashes, return_index=True)
    again = len(file) - len(first)
    tokens = int(file.lengths.sum(dtype=np.int64) - file.lengths[first].sum(dtype=np.int64))
    return f"\nduplicates: {again:,} documents ({tokens:,} tokens) repeat an earlier one exactly"
