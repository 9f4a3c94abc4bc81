"""Compressed files as plain byte streams that notice whatever is damaged, missing or left over."""

import io
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

# Compressed bytes taken at a time: little, because repetitive text grows ten thousandfold.
CHUNK = 2**12
BLOCK = 512  # bytes; xz's manual gives disks of such blocks as the reason for padding


class Compression(NamedTuple):
    """One compressed format: how its files are named, how they begin, and what undoes it."""

    name: str
    endings: tuple[str, ...]
    magic: tuple[bytes, ...]
    decompressor: Callable
    padding: int = 0  # a stream may be followed by zeros, a multiple of so many; 0: by none


GZIP = Compression("gzip", (".gz", ".gzip"), (b"\x1f\x8b",), lambda: zlib.decompressobj(wbits=31))


def open_streams(raw: BinaryIO, compression: Compression) -> BinaryIO:
    """The plain bytes of an opened file.

    Reading raises OSError, EOFError or the library's own error (gzip's is zlib.error) where the
    file isn't one or more whole streams of that compression and nothing else.
    """
    return io.BufferedReader(_Streams(raw, compression), 2**20)


class _Streams(io.RawIOBase):
    """Whole compressed streams, one after the other.

    The libraries' own readers pass over what follows a stream where it isn't another one: that
    may be a damaged stream, or what a broken copy filled up with zeros.
    """

    def __init__(self, file: BinaryIO, compression: Compression):
        self._file, self._compression = file, compression
        self._stream: Any = None
        self._streams = 0
        self._input, self._taken = b"", 0  # what waits to be decompressed; bytes read so far
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
        self._input = self._input or self._take(CHUNK)
        if self._streams and self._stream is None and self._compression.padding:
            self._skip_padding()
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

    def _take(self, count: int) -> bytes:
        taken = self._file.read(count)
        self._taken += len(taken)
        return taken

    def _skip_padding(self) -> None:
        """Pass over zeros that are allowed after a stream.

        Raises OSError where they rather stand for a lost stream, which ends anywhere: padding is
        short, or fills a block.
        """
        zeros = 0
        while self._input.startswith(b"\0"):
            rest = self._input.lstrip(b"\0")
            zeros += len(self._input) - len(rest)
            self._input = rest or self._take(CHUNK)
        end = self._taken - len(self._input)
        if zeros % self._compression.padding or (zeros >= BLOCK and end % BLOCK):
            where = f"after stream {self._streams}"
            raise OSError(f"{zeros} zeros {where}: padding, or what a copy lost")

    def _next_stream(self):
        """A decompressor for what is next in the file. Raises OSError where it is no stream."""
        self._input += self._take(max(0, 6 - len(self._input)))  # the longest magic
        if not self._input.startswith(self._compression.magic):
            where = f" after stream {self._streams}" if self._streams else ""
            if not any(self._input):
                raise OSError(f"zeros{where}: padding, or what a copy lost")
            raise OSError(f"something that is no {self._compression.name} stream{where}")
        return self._compression.decompressor()
