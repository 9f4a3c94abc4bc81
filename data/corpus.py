"""Corpora as streams: every source yields its records in order, holding a few at a time.

A *unit* is what a source gives for one record (a line, a table row, a file); `data.records` makes
documents of them.
"""

import glob
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data import builtin
from data.compression import DAMAGE, decompress
from data.files import hash_spans, sha256
from data.folders import PassedOver, files_of, found_by_pattern, without_copies
from data.formats import ARROW, ARROW_MARK, BYTE_ORDER_MARK, JSON_LINES, PARQUET, TEXT, judge
from l2e.hub import PREFIX, is_hub, parse
from l2e.problems import Problem

MAX_DOCUMENT_BYTES = 2**31 - 1  # an index stores a document's length as int32


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
    compression: str = ""  # gzip, zstd, xz, bzip2 or none
    # Bytes [start, stop) of the file, for one share of it: the lines, or the row groups, that
    # begin in there.
    span: tuple[int, int] | None = None

    @property
    def size(self) -> int:
        """Bytes on this machine's disk, 0 for what isn't a file there."""
        if self.span:
            return self.span[1] - self.span[0]
        return Path(self.name).stat().st_size if self.format not in ("hf", "builtin") else 0

    def look(self) -> tuple[int, int, int] | None:
        """What changes when the file is written to; None for what isn't a file here."""
        try:
            found = Path(self.name).stat()
        except OSError:
            return None
        return found.st_size, found.st_mtime_ns, found.st_ino

    def sha256(self) -> str | None:
        """Hash of the source's content; None where only the network has it."""
        if self.format == "hf":
            return None
        if self.format == "builtin":
            return builtin.content_hash(self.name)
        return (
            hash_spans(Path(self.name), [self.span])[1][0] if self.span else sha256(Path(self.name))
        )


class Found(NamedTuple):
    """What inputs name: the sources to read, and what lies beside them and isn't read."""

    sources: list[Source]
    passed_over: PassedOver


def find_sources(inputs: list[str]) -> list[Source]:
    """The sources that files, folders, globs and `hf:` ids name, folders and globs in order.

    Raises ValueError for a name without a file behind it, and for a file of an unreadable kind.
    """
    return look_over(inputs).sources


def look_over(inputs: list[str]) -> Found:
    """As `find_sources`, with what is passed over."""
    entries: list[Path | Source] = []
    passed_over: PassedOver = {}
    for name in inputs:
        if is_hub(name):
            entries.append(Source(name, "hf"))
            continue
        paths = _paths(name)
        if not Path(name).exists():  # a pattern, which meets what nobody named
            paths, beside = found_by_pattern(paths)
            _merge(passed_over, beside)
        for path in paths:
            inside, beside = files_of(path) if path.is_dir() else ([path], {})
            entries += inside
            _merge(passed_over, beside)
    if not entries:
        others = ", ".join(f"{len(names)} {reason}" for reason, names in passed_over.items())
        raise ValueError(f"input {' '.join(inputs)}: holds no files{others and f' but {others}'}")
    _check_names([entry.name if isinstance(entry, Source) else str(entry) for entry in entries])
    files, copies = without_copies([entry for entry in entries if isinstance(entry, Path)])
    _merge(passed_over, copies)
    once = set(files)
    sources = [
        entry if isinstance(entry, Source) else Source(str(entry), *judge(entry))
        for entry in entries
        if isinstance(entry, Source) or entry in once
    ]
    return Found(sources, passed_over)


def _check_names(names: list[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"input {twice[0]}: is named twice; name each file once")
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            reason = "its name is no UTF-8, so no manifest can hold it"
            raise Problem("input", ascii(name), reason, "rename it") from None


def _paths(name: str) -> list[Path]:
    """The files and folders of a name or pattern. Raises ValueError where it has none."""
    paths = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))
    if not paths:
        raise ValueError(
            f"input {name!r}: no such file, folder or pattern; "
            f"a Hugging Face data set is written {PREFIX}owner/name"
        )
    for path in map(Path, paths):
        if not path.exists():
            raise Problem("input", path, "is a broken link", "mend it, or leave it out")
        if not (path.is_file() or path.is_dir()):
            raise Problem(
                "input", path, "is no regular file", "write its content to one: it is read twice"
            )
    return [Path(path) for path in paths]


def _merge(into: PassedOver, more: PassedOver) -> None:
    for reason, names in more.items():
        into.setdefault(reason, []).extend(names)


def read_units(sources: list[Source], fields: Fields, skip: int = 0) -> Iterator[Unit]:
    """All units of the sources, without the first `skip`.

    Raises ValueError where a source is damaged or lacks the text column.
    """
    units = itertools.chain.from_iterable(_read_source(s, fields) for s in sources)
    return itertools.islice(units, skip, None)


def _read_source(source: Source, fields: Fields) -> Iterator[Unit]:
    readers = {
        JSON_LINES: _lines,
        TEXT: _whole_file,
        PARQUET: _table_rows,
        ARROW: _table_rows,
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
    """Lines without their ends; blank ones are empty, and None stands for one past the limit.

    A byte order mark is dropped wherever a line begins with it, as in files joined by `cat`.
    """
    limit = MAX_DOCUMENT_BYTES
    start, stop = source.span or (0, math.inf)
    with Path(source.name).open("rb") as raw, decompress(raw, source.compression) as stream:
        if start:  # a line that began before is another share's
            raw.seek(start - 1)
            _skip_line(raw, raw.readline(limit))
        position = raw.tell()
        while position < stop and (line := stream.readline(limit + 1)):
            if len(line) > limit:
                _skip_line(stream, line)
                line = None
            position = raw.tell()
            content = line if line is None else line.removeprefix(BYTE_ORDER_MARK).strip()
            yield content, position - start


def _skip_line(stream: BinaryIO, line: bytes) -> None:
    """Read to the end of the line that begins with `line`."""
    while line and not line.endswith(b"\n"):
        line = stream.readline(MAX_DOCUMENT_BYTES)


def _whole_file(source: Source, fields: Fields) -> Contents:
    with Path(source.name).open("rb") as raw, decompress(raw, source.compression) as stream:
        content = stream.read(MAX_DOCUMENT_BYTES + 1)
        if len(content) > MAX_DOCUMENT_BYTES:
            yield None, raw.tell()
        else:
            yield content.removeprefix(BYTE_ORDER_MARK) or b"\n", raw.tell()


def _builtin_rows(source: Source, fields: Fields) -> Contents:
    return ((row, 0) for row in builtin.documents(source.name))


def _table_rows(source: Source, fields: Fields) -> Contents:
    """Rows of a Parquet or Arrow file, a small batch in memory at a time."""
    import pyarrow as arrow

    try:
        opened = _parquet(source, fields) if source.format == PARQUET else _arrow(source.name)
        schema, batches = opened
        for batch, position in batches:
            columns = {column: batch[column] for column in _columns(source.name, fields, schema)}
            for row in range(batch.num_rows):
                yield {column: _cell(cells[row]) for column, cells in columns.items()}, position
    except arrow.ArrowException as error:
        raise OSError(error) from error


def _parquet(source: Source, fields: Fields):
    """Schema and (batch, position) pairs of a Parquet file, or of a share's row groups of it."""
    import pyarrow.parquet as parquet

    file = parquet.ParquetFile(source.name, pre_buffer=False, page_checksum_verification=True)
    columns = _columns(source.name, fields, file.schema_arrow)
    bytes_a_row = Path(source.name).stat().st_size / max(1, file.metadata.num_rows)
    groups = row_groups(file.metadata, source.span)
    batches = file.iter_batches(batch_size=64, columns=columns, row_groups=groups)
    ends = itertools.count(1)
    return file.schema_arrow, ((batch, int(next(ends) * 64 * bytes_a_row)) for batch in batches)


def row_groups(metadata, span: tuple[int, int] | None) -> list[int]:
    """The numbers of a Parquet file's row groups that begin in the span, in their order."""
    groups = range(metadata.num_row_groups)
    if span is None:
        return list(groups)
    begin = 0
    found = []
    for number in groups:
        column = metadata.row_group(number).column(0)
        offset = column.dictionary_page_offset or column.data_page_offset
        begin = max(begin, offset)  # should they not lie in their order, this keeps it
        if span[0] <= begin < span[1]:
            found.append(number)
    return found


def _arrow(name: str):
    """Schema and (batch, position) pairs of an Arrow file, in the file or the stream form."""
    import pyarrow as arrow

    file = arrow.memory_map(name)
    try:
        reader = arrow.ipc.open_file(file)
        batches: Iterator = map(reader.get_batch, range(reader.num_record_batches))
    except arrow.ArrowInvalid:
        _refuse_cut_stream(file)
        reader = arrow.ipc.open_stream(file)
        batches = _whole_stream(reader, file)
    return reader.schema, ((batch, file.tell()) for batch in batches)


def _refuse_cut_stream(file) -> None:
    """Raises EOFError for an Arrow stream without its end marker, which a reader passes over: it
    may lack whole batches. At the end `file` is at its beginning."""
    file.seek(0)
    has_marks = file.read(len(ARROW_MARK)) == ARROW_MARK  # older streams have none
    file.seek(max(0, file.size() - 2 * len(ARROW_MARK)))
    if has_marks and file.read() != ARROW_MARK + b"\0" * len(ARROW_MARK):
        raise EOFError("the Arrow stream ends before its end marker")
    file.seek(0)


def _whole_stream(reader, file) -> Iterator:
    """The batches of an Arrow stream. Raises OSError where something comes after its end, such as
    another stream."""
    yield from reader
    if file.tell() < file.size():
        raise OSError("something follows the end of the Arrow stream")


def _columns(name: str, fields: Fields, schema) -> list[str]:
    """The columns of a table that hold the fields; a column may have dots in its own name.

    Raises ValueError where there is none for the text.
    """
    text, subset = (
        field if field in schema.names else field.split(".")[0]
        for field in (fields.text, fields.subset)
    )
    if schema.names.count(text) != 1:
        found = "two columns" if text in schema.names else "no column"
        raise ValueError(
            f"input {name}: has {found} {fields.text!r}, only {', '.join(schema.names)}; "
            "name the text's column with --text-field"
        )
    return [text, subset] if schema.names.count(subset) == 1 and subset != text else [text]


def _cell(value) -> object:
    """A cell as a Python object; text that is no UTF-8 stays bytes."""
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return value.as_buffer().to_pybytes()


def _hugging_face_rows(source: Source, fields: Fields) -> Contents:
    """Rows of `hf:owner/name[@revision][:configuration]`, streamed, of the split `train`."""
    import datasets

    name, _, configuration = source.name.removeprefix(PREFIX).partition(":")
    name, revision = parse(name)
    try:
        rows = datasets.load_dataset(
            name, configuration or None, split="train", streaming=True, revision=revision
        )
    except Exception as error:  # network, authentication, unknown name: the library has many
        raise ValueError(f"input {source.name}: cannot be opened ({error})") from error
    try:
        yield from ((row, 0) for row in rows)
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
