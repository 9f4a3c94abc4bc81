"""What can be known about a run's data before any process group exists."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data import manifest
from data.dataset import blend_shares, check_enough, split_documents
from data.files import sha256
from data.index import TokenFile, bin_path, idx_path
from data.tokenizer import Tokenizer, load_tokenizer
from l2e.problems import Problem

# A .bin file up to this size is hashed and scanned whole; of a larger one, this much is scanned.
LOOK_AT_BYTES = 2**28
BLOCKS = 64
MEND_TOKENIZER = "name the tokenizer the corpus was prepared with, or prepare it anew"


def check(
    path: str | Sequence[str] | Mapping[str, float],
    sequence_length: int,
    samples: int,
    order: str = "neox",
    split: float | None = None,
    validation_samples: int = 0,
    tokenizer: str | Path | None = None,
    vocab_size: int | None = None,
) -> list[Problem]:
    """Everything wrong with a training or a validation set, as `open_dataset` would open it.

    Args:
        split: share held out for validation, where one is: both sides must then give samples.
        validation_samples: how many the held-out side must give.
        tokenizer: file of the run's tokenizer, held against the one the corpus was made with.
        vocab_size: rows of the model's embedding, which every id must be below.

    Returns an empty list where nothing is wrong.
    """
    loaded, problems = check_tokenizer(tokenizer, vocab_size)
    try:
        prefixes = blend_shares(path)
    except Problem as problem:
        return [*problems, problem]
    for prefix in prefixes:
        try:
            file = TokenFile(prefix)
            check_manifest(file)
            if loaded is not None:
                _check_tokenizer(file, loaded)
            if vocab_size is not None:
                _check_ids(file, vocab_size)
            wanted = {"train": samples, "validation": validation_samples}
            for part in ("train",) if split is None else ("train", "validation"):
                documents = split_documents(len(file), split, part)
                alone = len(prefixes) == 1  # of a blend each file gives a share only
                side = part if split is not None else None
                check_enough(file, documents, sequence_length, wanted[part] * alone, order, side)
        except Problem as problem:
            problems.append(problem)
    return problems


def check_tokenizer(
    path: str | Path | None, vocab_size: int | None
) -> tuple[Tokenizer | None, list[Problem]]:
    """The tokenizer, where it can be read, and what is wrong with it for such a model."""
    if path is None:
        return None, []
    try:
        loaded = load_tokenizer(path)
    except Problem as problem:
        return None, [problem]
    return loaded, _check_vocabulary(loaded, vocab_size)


def check_one_tokenizer(sets: Mapping[str, Any], tokenizer: Path | None = None) -> list[Problem]:
    """All token files of a run hold the ids of one tokenizer, which ends documents by one token.

    `sets` are {"data.path": ..., "data.validation_path": ...} in any form these have, None left
    out. Files without a manifest can't be held against the others.
    """
    problems = []
    first: tuple[str, dict] | None = None
    file = load_tokenizer(tokenizer) if tokenizer is not None else None
    for key, prefix, found in _manifests(sets):
        first = first or (prefix, found)
        made_with = found["tokenizer_sha256"]
        if file is not None and made_with != file.sha256:
            problems.append(_other_tokenizer(file, prefix, made_with))
        elif file is None and made_with != first[1]["tokenizer_sha256"]:
            reason = (
                f"was prepared with the tokenizer {found['tokenizer_path']} ({made_with[:12]}), "
                f"but {first[0]} with {first[1]['tokenizer_path']} "
                f"({first[1]['tokenizer_sha256'][:12]})"
            )
            problems.append(Problem(key, prefix, reason, "prepare both with one tokenizer"))
        elif len({found.get("end_of_text"), first[1].get("end_of_text")} - {None}) > 1:
            reason = (
                f"its documents end with token {found.get('end_of_text')}, those of {first[0]} "
                f"with {first[1].get('end_of_text')}"
            )
            fix = "prepare both with the same --end-of-text"
            problems.append(Problem(key, prefix, reason, fix))
    return problems


def default_tokenizer(path: Any) -> Path | None:
    """The tokenizer file that token files were prepared with, where its content still is that.

    `path` is `data.path` in any form. Looked for where the manifest says, and beside the files.
    """
    for _, prefix, found in _manifests({"data.path": path}):
        recorded = Path(found["tokenizer_path"])
        for candidate in (recorded, Path(prefix).parent / recorded.name):
            if candidate.is_file() and sha256(candidate) == found["tokenizer_sha256"]:
                return candidate
    return None


def _manifests(sets: Mapping[str, Any]) -> Iterator[tuple[str, str, dict]]:
    """(key, prefix, manifest) of every token file that has one; what is damaged, `check` tells."""
    for key, path in sets.items():
        try:
            prefixes = [] if path is None else list(blend_shares(path))
        except Problem:
            continue
        for prefix in prefixes:
            try:
                found = manifest.read(prefix)
            except Problem:
                continue
            if found is not None:
                yield key, prefix, found


def _check_vocabulary(tokenizer: Tokenizer, vocab_size: int | None) -> list[Problem]:
    if vocab_size is None or tokenizer.vocab_size <= vocab_size:
        return []
    return [
        Problem(
            "model.vocab_size",
            vocab_size,
            f"the tokenizer {tokenizer.path} has {tokenizer.vocab_size} ids",
            f"set model.vocab_size to {tokenizer.vocab_size} or more, or another tokenizer",
        )
    ]


def check_manifest(file: TokenFile, whole: bool = False) -> None:
    """The files are those the manifest describes; `whole` reads large ones too.

    Raises `Problem` where they aren't.
    """
    found = manifest.read(file.prefix)
    if found is None:
        return
    hashed = {"idx_sha256": idx_path(file.prefix)}
    if whole or bin_path(file.prefix).stat().st_size <= LOOK_AT_BYTES:
        hashed["bin_sha256"] = bin_path(file.prefix)
    for key, path in hashed.items():
        if found.get(key) != sha256(path):
            raise Problem(
                "token file",
                path,
                f"its content is not what {manifest.path(file.prefix)} says it is",
                "copy or prepare the files anew",
            )


def _check_tokenizer(file: TokenFile, tokenizer: Tokenizer) -> None:
    """The corpus can be this tokenizer's, and is where its manifest says with which it was made."""
    made_with = manifest.recorded(file.prefix, "tokenizer_sha256")
    largest = np.iinfo(file.dtype).max
    if made_with not in (None, tokenizer.sha256):
        raise _other_tokenizer(tokenizer, file.prefix, made_with)
    if made_with is None and tokenizer.vocab_size - 1 > largest:
        raise Problem(
            "tokenizer.path",
            tokenizer.path,
            f"its ids go up to {tokenizer.vocab_size - 1}, but {file.prefix} stores {file.dtype}, "
            f"up to {largest}, so it holds another tokenizer's",
            MEND_TOKENIZER,
        )


def _other_tokenizer(tokenizer: Tokenizer, prefix: str, made_with: str) -> Problem:
    return Problem(
        "tokenizer.path",
        tokenizer.path,
        f"hash {tokenizer.sha256[:12]}, but {prefix} was prepared with the tokenizer "
        f"{made_with[:12]}",
        MEND_TOKENIZER,
    )


def _check_ids(file: TokenFile, vocab_size: int) -> None:
    """No id is negative or past the vocabulary, in a small file whole, else in many places."""
    count = len(file.tokens)
    block = max(1, min(count, LOOK_AT_BYTES // file.dtype.itemsize) // BLOCKS)
    for start in np.linspace(0, count - block, BLOCKS if count > block else 1, dtype=np.int64):
        tokens = file.tokens[start : start + block + 1]
        worst = int(tokens.min()) if int(tokens.min()) < 0 else int(tokens.max())
        if not 0 <= worst < vocab_size:
            raise Problem(
                "token file",
                bin_path(file.prefix),
                f"holds the id {worst}, outside a vocabulary of {vocab_size}",
                "take the model's tokenizer to prepare it, or the right model.vocab_size",
            )
