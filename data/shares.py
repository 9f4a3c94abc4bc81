"""Sources divided among machines, each of which prepares its share; `data.join` joins them.

A share is a stretch of the sources laid end to end, as many bytes as the others: whole files, row
groups of Parquet files, lines of plain JSON-lines files.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from data.corpus import Source, row_groups
from data.files import chunks, hash_spans
from data.formats import JSON_LINES, PARQUET
from l2e.problems import Problem


@dataclass(frozen=True)
class Share:
    """Share `number` of `of`, counted from 1, of all `sources`."""

    number: int
    of: int
    sources: list[Source]

    @classmethod
    def parse(cls, text: str, sources: list[Source]) -> "Share":
        """The share that "3/16" means. Raises ValueError for what can't be divided."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        number, of = map(int, found.groups()) if found else (0, 0)
        if not 1 <= number <= of:
            raise Problem("--shard", text, "is no share", "write 3/16 for the third of sixteen")
        streamed = next((s.name for s in sources if s.format in ("hf", "builtin")), None)
        if streamed:
            fix = "download it, and name its files"
            raise Problem("--shard", text, f"{streamed} is no file, and can't be divided", fix)
        return cls(number, of, sources)

    @property
    def job(self) -> dict:
        """What all shares of the same sources have in common, and the number."""
        everything = [[source.name, source.format, source.size] for source in self.sources]
        return {"number": self.number, "of": self.of, "sources": everything}

    def own(self) -> list[Source]:
        """This share's sources; files of which only a part is in it have their span."""
        return divide(self.sources, self.of)[self.number - 1]

    def facts(self) -> dict:
        """What joining needs to know of this share, beside what every manifest says.

        Of each part of a file the number of its lines (or rows); of a file that begins here and
        goes on in other shares, the hash of the whole and of each part.
        """
        own = [source for source in self.own() if source.span]
        files = {}
        for source in own:
            if source.span and source.span[0] == 0:
                shares = divide(self.sources, self.of)
                parts = [s.span for share in shares for s in share if s.name == source.name]
                whole, hashes = hash_spans(Path(source.name), [part for part in parts if part])
                files[source.name] = {"sha256": whole, "parts": hashes}
        lines = {source.name: _count_lines(source) for source in own}
        return {"number": self.number, "of": self.of, "lines": lines, "files": files}


def divide(sources: list[Source], of: int) -> list[list[Source]]:
    """The sources of every share, in their order."""
    total = sum(source.size for source in sources)
    cuts = [total * k // of for k in range(of)] + [total + 1]  # an empty file may lie at the end
    shares: list[list[Source]] = [[] for _ in range(of)]
    start = 0
    for source in sources:
        size = source.size
        is_plain = source.format == JSON_LINES and not source.compression
        for share, first, last in zip(shares, cuts[:-1], cuts[1:], strict=True):
            span = max(0, first - start), min(size, last - start)
            begins_here = first <= start < last
            if span == (0, size) or not (is_plain or source.format == PARQUET):
                share += [source] * begins_here
            elif span[0] < span[1]:
                share.append(replace(source, span=span))
        start += size
    return shares


def _count_lines(source: Source) -> int:
    """Lines of a plain file, or rows of a Parquet file, that begin in the source's span."""
    assert source.span is not None
    start, stop = source.span
    if source.format == PARQUET:
        import pyarrow.parquet as parquet

        metadata = parquet.read_metadata(source.name)
        groups = row_groups(metadata, source.span)
        return sum(metadata.row_group(group).num_rows for group in groups)
    # A line begins at the file's start and after each line's end.
    return (start == 0) + sum(
        chunk.count(b"\n") for chunk in chunks(Path(source.name), max(0, start - 1), stop - 1)
    )
