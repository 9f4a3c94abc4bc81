"""The compressions that a corpus's files may have; `l2e.streams` reads them."""

import bz2
import lzma
import zlib
from typing import BinaryIO

import zstandard

from l2e.streams import GZIP, Compression, open_streams

# What the libraries raise for damaged content, beside OSError and EOFError.
DAMAGE = (zlib.error, lzma.LZMAError, zstandard.ZstdError)
LARGEST_WINDOW = 2**31  # bytes; zstd refuses the windows of `--long=28` and more by default


def _zstandard_frame():
    return zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW).decompressobj()


# zstd also begins with one of its "skippable" frames, which some programs put before the first.
_SKIPPABLE = tuple(bytes([0x50 + n, 0x2A, 0x4D, 0x18]) for n in range(16))
COMPRESSIONS = (
    GZIP,
    Compression("zstd", (".zst", ".zstd"), (b"\x28\xb5\x2f\xfd", *_SKIPPABLE), _zstandard_frame),
    Compression("xz", (".xz",), (b"\xfd7zXZ\0",), lzma.LZMADecompressor, padding=4),
    Compression("bzip2", (".bz2", ".bzip2"), (b"BZh",), bz2.BZ2Decompressor),
)
BY_NAME = {compression.name: compression for compression in COMPRESSIONS}


def decompress(raw: BinaryIO, compression: str) -> BinaryIO:
    """The plain bytes of an opened file; `compression` is one of `BY_NAME`, or "" for none.

    Reading raises OSError, EOFError or one of `DAMAGE` where the file isn't one or more whole
    streams of that compression and nothing else.
    """
    return open_streams(raw, BY_NAME[compression]) if compression else raw
