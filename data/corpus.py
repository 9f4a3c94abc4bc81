"""Corpora as streams: every source yields its records in order, holding a few at a time.

A *unit* is what a source gives for one record (a line, a table row, a file); `data.records` makes
documents of them.
"""

import glob
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data import builtin
from data.compression import COMPRESSIONS, DAMAGE, decompress
from data.files import sha256

MAX_DOCUMENT_BYTES = 2**31 - 1  # an index stores a document's length as int32
HUGGING_FACE = "hf:"


class Unit(NamedTuple):
    """A record as its source holds it: bytes of JSON or of text, or the fields of a row."""

    content: bytes | dict | None  # None: too large to be read
    source: "Source"
    line: int
    position: int  # bytes of the source read so far


@dataclass(frozen=True)
class Fields:
    """Where a record keeps its text and the name of its subset (dots lead inwards)."""

    text: str = "text"
    subset: str = "meta.pile_set_name"


@dataclass(frozen=True)
class Source:
    """One file, Hugging Face data set or part of the built-in corpus."""

    name: str
    format: str  # jsonl, text, parquet, arrow, hf or builtin

    def sha256(self) -> str | None:
        """Hash of the source's content; None where only the network has it."""
        if self.format == "hf":
            return None
        if self.format == "builtin":
            return builtin.content_hash(self.name)
        return sha256(Path(self.name))


def find_sources(inputs: list[str]) -> list[Source]:
    """The sources that files, folders, globs and `hf:` ids name, folders and globs in order.

    Raises ValueError for a name without a file behind it.
    """
    sources = []
    for name in inputs:
        if name.startswith(HUGGING_FACE):
            sources.append(Source(name, "hf"))
            continue
        paths = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))
        if not paths:
            raise ValueError(
                f"input {name!r}: no such file, folder or pattern; "
                f"a Hugging Face data set is written {HUGGING_FACE}owner/name"
            )
        for path in map(Path, paths):
            inside = sorted(p for p in path.rglob("*") if p.is_file() and p.name[0] != ".")
            found = inside if path.is_dir() else [path]
            sources += [Source(str(p), _format_of(p)) for p in found]
    if not sources:
        raise ValueError(f"input {' '.join(inputs)}: holds no files")
    twice = [source.name for source, count in Counter(sources).items() if count > 1]
    if twice:
        raise ValueError(f"input {twice[0]}: is named twice; name each file once")
    return sources


def _format_of(path: Path) -> str:
    """By the ending; a file of unknown ending is one text document."""
    suffixes = [s for s in path.suffixes if s not in COMPRESSIONS]
    formats = {
        ".jsonl": "jsonl",
        ".ndjson": "jsonl",
        ".json": "jsonl",
        ".parquet": "parquet",
        ".arrow": "arrow",
    }
    return formats.get(suffixes[-1] if suffixes else "", "text")


def read_units(sources: list[Source], fields: Fields, skip: int = 0) -> Iterator[Unit]:
    """All units of the sources, without the first `skip`.

    Raises ValueError where a source is damaged or lacks the text column.
    """
    units = itertools.chain.from_iterable(_read_source(s, fields) for s in sources)
    return itertools.islice(units, skip, None)


def _read_source(source: Source, fields: Fields) -> Iterator[Unit]:
    readers = {
        "jsonl": _lines,
        "text": _whole_file,
        "parquet": _table_rows,
        "arrow": _table_rows,
        "hf": _hugging_face_rows,
        "builtin": _builtin_rows,
    }
    line = 0
    try:
        found = readers[source.format](source, fields)
        for line, (content, position) in enumerate(found, start=1):
            if content != b"":
                yield Unit(content, source, line, position)
    except (OSError, EOFError, *DAMAGE) as error:
        raise ValueError(
            f"input {source.name}: damaged or unreadable after record {line} ({error}); "
            "repair the file or leave it out"
        ) from error


# What every reader yields: a unit's content and the bytes of the source read so far.
Contents = Iterator[tuple[bytes | dict | None, int]]


def _lines(source: Source, fields: Fields) -> Contents:
    """Lines without their ends; blank ones are empty, and None stands for one past the limit."""
    limit = MAX_DOCUMENT_BYTES
    path = Path(source.name)
    with path.open("rb") as raw, decompress(path, raw) as stream:
        while line := stream.readline(limit + 1):
            if len(line) <= limit:
                yield line.strip(), raw.tell()
                continue
            while line and not line.endswith(b"\n"):
                line = stream.readline(limit)
            yield None, raw.tell()


def _whole_file(source: Source, fields: Fields) -> Contents:
    path = Path(source.name)
    with path.open("rb") as raw, decompress(path, raw) as stream:
        content = stream.read(MAX_DOCUMENT_BYTES + 1)
        yield (content or b"\n") if len(content) <= MAX_DOCUMENT_BYTES else None, raw.tell()


def _builtin_rows(source: Source, fields: Fields) -> Contents:
    return ((row, 0) for row in builtin.documents(source.name))


def _table_rows(source: Source, fields: Fields) -> Contents:
    """Rows of a Parquet or Arrow file, a small batch in memory at a time."""
    import pyarrow as arrow

    name = source.name
    try:
        schema, batches = (_parquet if source.format == "parquet" else _arrow)(name, fields)
        if fields.text.split(".")[0] not in schema.names:
            raise ValueError(
                f"input {name}: has no column {fields.text!r}, only {', '.join(schema.names)}; "
                "name the text's column with --text-field"
            )
        for batch, position in batches:
            columns = {column: batch[column] for column in _columns(fields, schema)}
            for row in range(batch.num_rows):
                yield {column: _cell(cells[row]) for column, cells in columns.items()}, position
    except arrow.ArrowException as error:
        raise OSError(error) from error


def _parquet(name: str, fields: Fields):
    """Schema and (batch, position) pairs of a Parquet file."""
    import pyarrow.parquet as parquet

    file = parquet.ParquetFile(name, pre_buffer=False, page_checksum_verification=True)
    columns = _columns(fields, file.schema_arrow)
    bytes_a_row = Path(name).stat().st_size / max(1, file.metadata.num_rows)
    batches = file.iter_batches(batch_size=64, columns=columns)
    ends = itertools.count(1)
    return file.schema_arrow, ((batch, int(next(ends) * 64 * bytes_a_row)) for batch in batches)


def _arrow(name: str, fields: Fields):
    """Schema and (batch, position) pairs of an Arrow file, in the file or the stream form."""
    import pyarrow as arrow

    file = arrow.memory_map(name)
    try:
        reader = arrow.ipc.open_file(file)
        batches = map(reader.get_batch, range(reader.num_record_batches))
    except arrow.ArrowInvalid:
        file.seek(0)
        reader = batches = arrow.ipc.open_stream(file)
    return reader.schema, ((batch, file.tell()) for batch in batches)


def _columns(fields: Fields, schema) -> list[str]:
    wanted = {fields.text.split(".")[0], fields.subset.split(".")[0]}
    return [name for name in schema.names if name in wanted]


def _cell(value) -> object:
    """A cell as a Python object; text that is no UTF-8 stays bytes."""
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return value.as_buffer().to_pybytes()


def _hugging_face_rows(source: Source, fields: Fields) -> Contents:
    """Rows of `hf:owner/name[:configuration]`, streamed, of the split `train`."""
    import datasets

    name, _, configuration = source.name.removeprefix(HUGGING_FACE).partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split="train", streaming=True)
    except Exception as error:  # network, authentication, unknown name: the library has many
        raise ValueError(f"input {source.name}: cannot be opened ({error})") from error
    yield from ((row, 0) for row in rows)
