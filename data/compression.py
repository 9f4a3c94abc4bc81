"""Compressed files as plain byte streams that notice when their end is missing."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import zstandard

COMPRESSIONS = {".gz", ".zst", ".xz", ".bz2"}
# What the libraries raise for damaged content, beside OSError and EOFError.
DAMAGE = (zlib.error, lzma.LZMAError, zstandard.ZstdError)


def decompress(path: Path, raw: BinaryIO) -> BinaryIO:
    """The plain bytes of an opened file, by the ending of its name."""
    openers: dict[str, Callable] = {
        ".gz": gzip.open,
        ".xz": lzma.open,
        ".bz2": bz2.open,
        ".zst": _open_zstandard,
    }
    return openers[path.suffix](raw) if path.suffix in openers else raw


def _open_zstandard(raw: BinaryIO) -> BinaryIO:
    return io.BufferedReader(_ZstandardFile(raw), 2**20)


class _ZstandardFile(io.RawIOBase):
    """One or more zstandard frames; zstandard's own reader takes a cut file for a whole one."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._output and self._fill():
            pass
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def _fill(self) -> bool:
        """Decompress the next piece of the file; False at its end."""
        self._input = self._input or self._file.read(2**17)
        if not self._input:
            if self._frame is not None:
                raise EOFError("the compressed stream ends before its end marker")
            return False
        if self._frame is None:
            self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._output = memoryview(self._frame.decompress(self._input))
        self._input = b""
        if self._frame.eof:
            self._input, self._frame = self._frame.unused_data, None
        return True
