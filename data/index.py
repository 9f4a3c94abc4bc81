"""Megatron's MMIDIDX token files: PREFIX.bin holds the tokens, PREFIX.idx says where they lie.

The index is a header (magic, version 1, the tokens' type, the numbers of sequences and of
document bounds), then int32 lengths [sequences], int64 byte offsets [sequences] and int64
document bounds [bounds]. Megatron-LM, megatron-core and gpt-neox read and write the same. They
hold all lengths in Python lists while writing, and check next to nothing while reading; here a
file of any size is written in bounded memory, and damage is found before the first batch.
"""

import struct
from pathlib import Path

import numpy as np

from data.files import Unchanged
from l2e.problems import Problem

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, type, sequences, document bounds
TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CHUNK = 2**20  # lengths handled at a time


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


class TokenFile:
    """An opened PREFIX.bin and PREFIX.idx, mapped into memory.

    `lengths` [documents] are in tokens. What Megatron calls a sequence is a document here, as it
    is to gpt-neox's and Megatron's GPT datasets. Raises ValueError for missing or damaged files.
    """

    def __init__(self, prefix: str | Path):
        self.prefix = str(prefix)
        for path in (bin_path(prefix), idx_path(prefix)):
            if not path.is_file():
                raise Problem(
                    "token file",
                    path,
                    "no such file",
                    "give the common prefix of a .bin and an .idx file, such as "
                    "`python launch/prepare.py --output PREFIX` writes",
                )
        self._files = [Unchanged(bin_path(prefix)), Unchanged(idx_path(prefix))]
        self.dtype, documents, bounds = self._read_header()
        self.lengths = self._map(np.int32, HEADER.size, documents)
        self._offsets = self._map(np.int64, HEADER.size + 4 * documents, documents)
        self._bounds = self._map(np.int64, HEADER.size + 12 * documents, bounds)
        self._check_layout()
        self.tokens = np.memmap(bin_path(prefix), dtype=self.dtype, mode="r")

    def _damaged(self, reason: str) -> Problem:
        path = idx_path(self.prefix)
        return Problem("token file", path, reason, "copy or prepare the files anew")

    def _read_header(self) -> tuple[np.dtype, int, int]:
        """The tokens' type and the numbers of documents and of bounds."""
        path = idx_path(self.prefix)
        size = path.stat().st_size
        if size < HEADER.size:
            raise self._damaged(f"truncated, {size} bytes are fewer than its header's")
        with path.open("rb") as stream:
            fields = HEADER.unpack(stream.read(HEADER.size))
        magic, version, code, documents, bounds = fields
        if magic != MAGIC:
            raise self._damaged(f"wrong magic {magic!r}, a Megatron index starts with {MAGIC!r}")
        if version != 1:
            raise self._damaged(f"version {version}, only version 1 is known")
        if code not in TYPES:
            raise self._damaged(f"type code {code} is not one of the integer types {list(TYPES)}")
        expected = HEADER.size + 12 * documents + 8 * bounds
        if size != expected:
            word = "truncated" if size < expected else "too long"
            raise self._damaged(
                f"{word}, {documents} documents and {bounds} bounds need {expected} bytes, "
                f"found {size}"
            )
        if not documents or not bin_path(self.prefix).stat().st_size:
            raise self._damaged("holds no tokens")
        return np.dtype(TYPES[code]), documents, bounds

    def _map(self, dtype: type, offset: int, count: int) -> np.ndarray:
        if not count:
            return np.empty(0, dtype)
        return np.memmap(idx_path(self.prefix), dtype, "r", offset, (count,))

    def _check_layout(self) -> None:
        """Documents must follow one another without gaps and fill the .bin file."""
        end = 0
        for start in range(0, len(self.lengths), CHUNK):
            lengths = self.lengths[start : start + CHUNK].astype(np.int64)
            if lengths.min() < 0:
                raise self._damaged(f"negative length of document {start + int(lengths.argmin())}")
            ends = end + np.cumsum(lengths) * self.dtype.itemsize
            wrong = self._offsets[start : start + CHUNK] != ends - lengths * self.dtype.itemsize
            if wrong.any():
                raise self._damaged(
                    f"the offset of document {start + int(wrong.argmax())} doesn't follow from "
                    f"the lengths before it, in tokens of {self.dtype}"
                )
            end = int(ends[-1])
        size = bin_path(self.prefix).stat().st_size
        if size != end:
            word = "truncated" if size < end else "too long"
            raise Problem(
                "token file",
                bin_path(self.prefix),
                f"{word}, its index needs {end} bytes, found {size}",
                "copy or prepare the files anew",
            )
        bounds = self._bounds
        if len(bounds) and (bounds[-1] != len(self.lengths) or (np.diff(bounds) < 0).any()):
            raise self._damaged("the document bounds don't rise to the number of documents")

    def check_unchanged(self) -> None:
        """Once something was read. Raises ValueError where another process wrote to the files."""
        for file in self._files:
            file.check()

    def __len__(self) -> int:
        """The number of documents."""
        return len(self.lengths)

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of a document, as stored, without a copy."""
        first = int(self._offsets[document]) // self.dtype.itemsize
        last = int(self.lengths[document]) if stop is None else stop
        return self.tokens[first + start : first + last]


def write_index(path: Path, dtype: np.dtype, lengths: np.ndarray) -> None:
    """Write the .idx file of documents that lie one after the other in a .bin file.

    `lengths` [documents] in tokens; a memory map will do, it is read a chunk at a time.
    """
    code = next(code for code, known in TYPES.items() if known == dtype)
    count = len(lengths)
    chunks = [slice(start, start + CHUNK) for start in range(0, count, CHUNK)]
    with path.open("wb") as stream:
        stream.write(HEADER.pack(MAGIC, 1, code, count, count + 1))
        for chunk in chunks:
            stream.write(np.asarray(lengths[chunk], np.int32).tobytes())
        end = 0
        for chunk in chunks:
            ends = end + np.cumsum(lengths[chunk], dtype=np.int64)
            stream.write(((ends - lengths[chunk]) * np.dtype(dtype).itemsize).tobytes())
            end = int(ends[-1])
        for start in range(0, count + 1, CHUNK):
            stream.write(np.arange(start, min(start + CHUNK, count + 1), dtype=np.int64).tobytes())
