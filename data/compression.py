"""Compressed files as plain byte streams that notice whatever is damaged, missing or left over."""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import zstandard

# What the libraries raise for damaged content, beside OSError and EOFError.
DAMAGE = (zlib.error, lzma.LZMAError, zstandard.ZstdError)
# Compressed bytes taken at a time: little, because repetitive text grows ten thousandfold.
CHUNK = 2**12
LARGEST_WINDOW = 2**31  # bytes; zstd refuses the windows of `--long=28` and more by default


class Compression(NamedTuple):
    """One compressed format: how its files are named, how they begin, and what undoes it."""

    name: str
    endings: tuple[str, ...]
    magic: tuple[bytes, ...]
    decompressor: Callable


def _zstandard_frame():
    return zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW).decompressobj()


# zstd also begins with one of its "skippable" frames, which some programs put before the first.
_SKIPPABLE = tuple(bytes([0x50 + n, 0x2A, 0x4D, 0x18]) for n in range(16))
COMPRESSIONS = (
    Compression("gzip", (".gz", ".gzip"), (b"\x1f\x8b",), lambda: zlib.decompressobj(wbits=31)),
    Compression("zstd", (".zst", ".zstd"), (b"\x28\xb5\x2f\xfd", *_SKIPPABLE), _zstandard_frame),
    Compression("xz", (".xz",), (b"\xfd7zXZ\0",), lzma.LZMADecompressor),
    Compression("bzip2", (".bz2", ".bzip2"), (b"BZh",), bz2.BZ2Decompressor),
)
BY_NAME = {compression.name: compression for compression in COMPRESSIONS}


def decompress(raw: BinaryIO, compression: str) -> BinaryIO:
    """The plain bytes of an opened file; `compression` is one of `BY_NAME`, or "" for none.

    Reading raises OSError, EOFError or one of `DAMAGE` where the file isn't one or more whole
    streams of that compression and nothing else.
    """
    if not compression:
        return raw
    return io.BufferedReader(_Streams(raw, BY_NAME[compression]), 2**20)


class _Streams(io.RawIOBase):
    """Whole compressed streams, one after the other.

    The libraries' own readers pass over what follows a stream where it isn't another one: that
    may be a damaged stream, or what a broken copy filled up with zeros.
    """

    def __init__(self, file: BinaryIO, compression: Compression):
        self._file, self._compression = file, compression
        self._stream: Any = None
        self._streams = 0
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
        self._input = self._input or self._file.read(CHUNK)
        if not self._input:
            if self._stream is not None or not self._streams:
                raise EOFError("the compressed stream ends before its end marker")
            return False
        if self._stream is None:
            self._stream = self._next_stream()
        self._output = memoryview(self._stream.decompress(self._input))
        self._input = b""
        if self._stream.eof:
            self._input, self._stream = self._stream.unused_data, None
            self._streams += 1
        return True

    def _next_stream(self):
        """A decompressor for what is next in the file. Raises OSError where it is no stream."""
        self._input += self._file.read(max(0, 6 - len(self._input)))  # the longest magic
        if not self._input.startswith(self._compression.magic):
            after = f" follows stream {self._streams}" if self._streams else ""
            raise OSError(f"something that is no {self._compression.name} stream{after}")
        return self._compression.decompressor()
