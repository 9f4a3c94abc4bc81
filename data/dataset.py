"""Training sets: sample i of a run, whatever the number of ranks that read it."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import manifest
from data.files import sha256
from data.index import TokenFile, idx_path
from data.maps import build_once
from data.order import ORDERS, Order, count_epochs, count_tokens
from l2e.memory import GIB, host_bytes
from l2e.problems import Problem

PRESHUFFLED = "preshuffled"
ORDER_NAMES = (*ORDERS, PRESHUFFLED)
# gpt-neox asks each file of a blend for 0.5 % more samples than its share.
SURPLUS = 1.005


class Piece(NamedTuple):
    """Tokens [start, stop) of a document: what a sample is made of."""

    file: TokenFile
    document: int
    start: int
    stop: int


class Samples(ABC):
    """A sequence of samples, each of `sequence_length` + 1 tokens, in the order of training."""

    sequence_length: int

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def pieces(self, i: int) -> list[Piece]:
        """Where the tokens of sample i come from."""

    @abstractmethod
    def identity(self) -> dict:
        """What fixes the order: files, length, seed. Two runs with equal ones read the same."""

    def __getitem__(self, i: int) -> np.ndarray:
        """Tokens of sample i, int64 [sequence_length + 1]."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        pieces = self.pieces(i)
        parts = [file.read(document, start, stop) for file, document, start, stop in pieces]
        tokens = np.concatenate(parts, dtype=np.int64)
        for file in {piece.file for piece in pieces}:
            file.check_unchanged()
        return tokens

    def order_hash(self, count: int, first: int = 0) -> str:
        """Hash of the tokens of `count` samples from the `first` on, as 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for i in range(first, min(first + count, len(self))):
            digest.update(self[i].astype("<u4").tobytes())
        return digest.hexdigest()


class Stream(Samples):
    """Samples cut from one corpus laid end to end; see `data.order`.

    The order is shuffled when a sample is first asked for, so that asking which data this is
    builds nothing.
    """

    def __init__(
        self,
        file: TokenFile,
        sequence_length: int,
        count: int,
        shuffle: Callable[[], Order],
        identity: dict,
    ):
        self.file = file
        self.sequence_length = sequence_length
        self._count = count
        self._shuffle = shuffle
        self._identity = identity

    @cached_property
    def order(self) -> Order:
        return self._shuffle()

    def __len__(self) -> int:
        return self._count

    def identity(self) -> dict:
        return self._identity

    def pieces(self, i: int) -> list[Piece]:
        documents, starts, samples = self.order
        position = int(samples[i]) * self.sequence_length
        end = position + self.sequence_length + 1
        visit = int(np.searchsorted(starts, position, "right")) - 1
        pieces = []
        while position < end:
            begin, stop = int(starts[visit]), min(end, int(starts[visit + 1]))
            if position < stop:
                document = int(documents[visit])
                pieces.append(Piece(self.file, document, position - begin, stop - begin))
            position = stop
            visit += 1
        return pieces


class Rows(Samples):
    """Pythia's preshuffled files: document i of the file is sample i of the training."""

    def __init__(self, file: TokenFile, sequence_length: int, rows: range, identity: dict):
        self.file = file
        self.sequence_length = sequence_length
        self.rows = rows
        self._identity = identity

    def __len__(self) -> int:
        return len(self.rows)

    def identity(self) -> dict:
        return self._identity

    def pieces(self, i: int) -> list[Piece]:
        return [Piece(self.file, self.rows[i], 0, self.sequence_length + 1)]


class Blend(Samples):
    """Several training sets in fixed shares: after any n samples each has had its share of n.

    `part` [samples] says which set sample i is taken from, `within` [samples] which of its own.
    """

    def __init__(self, parts: Sequence[Samples], shares: Sequence[float], part, within):
        self.parts = parts
        self.shares = shares
        self.sequence_length = parts[0].sequence_length
        self._part, self._within = part, within

    def __len__(self) -> int:
        return len(self._part)

    def identity(self) -> dict:
        return {"shares": list(self.shares), "parts": [part.identity() for part in self.parts]}

    def pieces(self, i: int) -> list[Piece]:
        return self.parts[self._part[i]].pieces(int(self._within[i]))


class Chain(Samples):
    """One training set after another: a run that needs more samples than were laid out for it."""

    def __init__(self, parts: Sequence[Samples]):
        self.parts = parts
        self.sequence_length = parts[0].sequence_length
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def identity(self) -> dict:
        """The first set's, which the others repeat in another order."""
        return self.parts[0].identity()

    def pieces(self, i: int) -> list[Piece]:
        number = int(np.searchsorted(self._ends, i, "right"))
        return self.parts[number].pieces(i - int(self._ends[number]) + len(self.parts[number]))


def open_dataset(
    path: str | Sequence[str] | Mapping[str, float],
    sequence_length: int,
    seed: int,
    samples: int,
    order: str = "neox",
    cache_dir: str | Path | None = None,
    split: float | None = None,
    part: str = "train",
) -> Samples:
    """Open token files as a training or a validation set.

    Args:
        path: prefix of a .bin/.idx pair; or several, blended in proportion to their tokens; or
            {prefix: weight}, blended in these proportions.
        sequence_length: L; a sample has L + 1 tokens, which overlap by one.
        seed: of the shuffles (Pythia: 1234).
        samples: how many the run needs (steps times global batch); epochs repeat as needed.
        order: "neox" (gpt-neox 1.0), "megatron" (megatron-core's GPTDataset) or "preshuffled"
            (rows of L + 1 tokens in the file's own order).
        cache_dir: folder for the shuffled maps, built once a machine and shared by its
            processes; None builds them in this process's memory.
        split: share of the documents, at the end of each file, kept for validation.
        part: "train" or "validation", which side of the split.

    Raises ValueError for damaged files, unknown orders, weights that aren't positive, and fewer
    tokens than one sample.
    """
    files, shares = open_files(path)
    blended = len(files) > 1
    part_of, within, counts = _blend_maps(list(shares.values()), samples, cache_dir)
    parts = []
    for (prefix, file), count in zip(files.items(), counts, strict=True):
        wanted = count
        if order == "neox" and (split is None or blended):
            wanted = max(count, math.ceil(samples * shares[prefix] * SURPLUS))
        elif order == "megatron" and blended:
            wanted = max(count, math.ceil(math.ceil(samples * shares[prefix]) * SURPLUS))
        documents = split_documents(len(file), split, part)
        check_enough(file, documents, sequence_length, wanted, order, part if split else None)
        parts.append(_open_part(file, documents, sequence_length, seed, wanted, order, cache_dir))
    return Blend(parts, list(shares.values()), part_of, within) if blended else parts[0]


def open_files(
    path: str | Sequence[str] | Mapping[str, float],
) -> tuple[dict[str, TokenFile], dict[str, float]]:
    """The files of any form of `data.path`, and the share of the samples that each one gives."""
    weights = blend_shares(path)
    files = {prefix: TokenFile(prefix) for prefix in weights}
    if not isinstance(path, str | Mapping):
        weights = {prefix: float(len(file.tokens)) for prefix, file in files.items()}
    total = sum(weights.values())
    return files, {prefix: weight / total for prefix, weight in weights.items()}


class Reading(NamedTuple):
    """How much of a file a run reads: its tokens for training, and how often each of them."""

    prefix: str
    tokens: int
    times: float


def readings(
    path: str | Sequence[str] | Mapping[str, float],
    sequence_length: int,
    samples: int,
    split: float | None = None,
) -> list[Reading]:
    """What so many training samples take of each file, as `open_dataset` would give them."""
    files, shares = open_files(path)
    found = []
    for prefix, file in files.items():
        tokens = count_tokens(split_documents(len(file), split, "train"), file.lengths)
        found.append(Reading(prefix, tokens, samples * shares[prefix] * sequence_length / tokens))
    return found


def blend_shares(path: str | Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    """{prefix: weight} of any form of `data.path`. Raises ValueError for an impossible blend."""
    if isinstance(path, str):
        return {path: 1.0}
    shares = dict(path) if isinstance(path, Mapping) else dict.fromkeys(path, 1.0)
    if not shares or len(shares) < len(path):
        raise Problem("data.path", path, "no file, or one twice", "name one or more, each once")
    for prefix, weight in shares.items():
        if not (math.isfinite(weight) and weight > 0):
            raise Problem(
                "data.path",
                Path(prefix),
                f"its weight {weight} in the blend is not greater than 0",
                "give a positive weight, or leave the file out",
            )
    if not math.isfinite(sum(shares.values())):
        raise Problem("data.path", None, "its weights add up to infinity", "give smaller ones")
    return shares


def split_documents(count: int, split: float | None, part: str) -> range:
    """The documents of one side of the split, rounded as gpt-neox rounds "1-split,split"."""
    if split is None:
        return range(count)
    held_out = round(split * count)
    # gpt-neox takes what the two roundings add up to too much off the first part's end.
    end = round((1 - split) * count)
    end -= end + held_out - count
    return range(end) if part == "train" else range(end, count)


def _blend_maps(
    shares: list[float], samples: int, cache_dir: str | Path | None
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """For every sample its file and its number there, and how many samples each file gives.

    The next sample is always taken from the file furthest behind its share, as in gpt-neox and
    Megatron, whose compiled helper does it.
    """
    if len(shares) == 1:
        return np.empty(0), np.empty(0), [samples]

    def build() -> dict[str, np.ndarray]:
        from megatron.core.datasets import helpers

        part, within = np.zeros(samples, np.int16), np.zeros(samples, np.int64)
        helpers.build_blending_indices(part, within, np.array(shares), len(shares), samples, False)
        return {"part": part, "within": within}

    maps = build_once(cache_dir, {"shares": shares, "samples": samples}, build)
    return maps["part"], maps["within"], np.bincount(maps["part"], minlength=len(shares)).tolist()


def _open_part(
    file: TokenFile,
    documents: range,
    length: int,
    seed: int,
    samples: int,
    order: str,
    cache_dir: str | Path | None,
) -> Samples:
    """One file's training set."""
    identity = {
        "index_sha256": sha256(idx_path(file.prefix)),
        "tokens_sha256": manifest.recorded(file.prefix, "bin_sha256"),
        "tokenizer_sha256": manifest.recorded(file.prefix, "tokenizer_sha256"),
        "documents": [documents.start, documents.stop],
        "order": order,
        "sequence_length": length,
        "seed": seed,
    }
    if order == PRESHUFFLED:
        return Rows(file, length, documents, identity)

    def build() -> dict[str, np.ndarray]:
        return ORDERS[order](documents, file.lengths, length, seed, samples)._asdict()

    def shuffle() -> Order:
        return Order(**build_once(cache_dir, {**identity, "samples": samples}, build))

    tokens = count_tokens(documents, file.lengths)
    epochs = count_epochs(tokens, length, samples)
    count = (epochs * tokens - 1) // length
    return Stream(file, length, count, shuffle, {**identity, "epochs": epochs})


def check_enough(
    file: TokenFile,
    documents: range,
    length: int,
    samples: int,
    order: str,
    side: str | None = None,
) -> None:
    """Raises `Problem` where these documents can't give so many samples in this order.

    `side` says which side of a split they are, "train" or "validation".
    """
    if order == PRESHUFFLED:
        return _check_rows(file, documents, length, samples)
    if order not in ORDERS:
        names = ", ".join(ORDER_NAMES)
        raise Problem("data.order", order, "no such order", f"choose one of {names}")
    tokens = count_tokens(documents, file.lengths)
    if tokens < length + 1:
        share, fix = "", "take a longer corpus or a shorter data.sequence_length"
        if side is not None:
            name = "training" if side == "train" else "validation"
            share = f"the {name} side of data.validation_fraction is short: of {len(file)} in all, "
            fix = (
                "name other token files in data.validation_path, so that nothing is held out of "
                "these, or change data.validation_fraction or data.sequence_length"
            )
        raise Problem(
            "token file",
            Path(file.prefix),
            f"{share}{tokens} tokens in {len(documents)} documents are fewer than one sample of "
            f"{length} + 1",
            fix,
        )
    epochs = count_epochs(tokens, length, samples)
    size = 12 * epochs * len(documents) + 8 * samples
    if size > (memory := host_bytes()):
        raise Problem(
            "token file",
            Path(file.prefix),
            f"{samples:,} samples read its {tokens:,} tokens {epochs:,} times, and to shuffle that "
            f"takes {size / GIB:,.0f} GiB, of which this machine has {memory / GIB:,.0f}",
            "take a larger corpus, fewer train.steps, a smaller train.global_batch_size or fewer "
            "evaluate.batches",
        )


def _check_rows(file: TokenFile, documents: range, length: int, samples: int) -> None:
    wrong = file.lengths[documents.start : documents.stop] != length + 1
    if wrong.any():
        row = documents[int(wrong.argmax())]
        raise Problem(
            "token file",
            Path(file.prefix),
            f"row {row} has {file.lengths[row]} tokens, a preshuffled file needs sequence_length "
            f"+ 1 = {length + 1} in each",
            "set data.order or data.sequence_length to what the file holds",
        )
    if len(documents) < samples:
        raise Problem(
            "token file",
            Path(file.prefix),
            f"{len(documents)} rows are fewer than the {samples} samples the run needs, and a "
            "preshuffled order can't be repeated",
            "take fewer train.steps",
        )
