"""Units of a corpus as documents, or the reason why one isn't. Nothing is dropped in silence."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from data import corpus
from data.corpus import Fields, Unit
from data.formats import TEXT, wide_encoding
from l2e.files import once


class Record(NamedTuple):
    """One document; `line` counts from 1 within its source."""

    text: str
    subset: str
    source: str
    line: int


class Reject(NamedTuple):
    """A unit that isn't a document, with the reason and the unit itself."""

    reason: str
    source: str
    line: int
    content: str


def parse(unit: Unit, fields: Fields) -> Record | Reject:
    """The document of a unit, or why it isn't one."""
    content, source, line, _ = unit
    if content is None:
        return Reject(f"longer than {corpus.MAX_DOCUMENT_BYTES} bytes", source.name, line, "")
    try:
        text, subset = _text_of(unit, fields)
        _check_text(text)
    except _NoDocument as reason:
        return Reject(str(reason), source.name, line, _printable(content))
    return Record(text, subset, source.name, line)


class _NoDocument(Exception):
    """Why a unit can't be a document."""


def _text_of(unit: Unit, fields: Fields) -> tuple[str, str]:
    """The text and the subset's name of a unit."""
    content: Any = unit.content
    if isinstance(content, bytes):
        if unit.source.format == TEXT:
            return _decoded_file(content), Path(unit.source.name).parent.name
        line = _decoded(content)
        # A name that is there twice loses what it first stood for; looking for it takes time.
        repeats = line.count(f'"{fields.text.rpartition(".")[2]}"') > 1
        try:
            content = json.loads(line, object_pairs_hook=once if repeats else None)
        except (ValueError, RecursionError) as error:
            raise _NoDocument(f"broken JSON: {error}") from error
    if not isinstance(content, dict):
        raise _NoDocument(f"no JSON object but {type(content).__name__}")
    text = _inside(content, fields.text)
    if isinstance(text, bytes):  # of a binary column, or of a text column with damaged text
        try:
            text = text.decode()
        except UnicodeDecodeError:
            raise _NoDocument(
                f"field {fields.text!r}: expected text, found invalid UTF-8"
            ) from None
    if not isinstance(text, str):
        raise _NoDocument(f"field {fields.text!r}: expected text, found {_found(text, content)}")
    subset = _inside(content, fields.subset)
    return text, subset if isinstance(subset, str) else ""


def _found(value: object, record: dict) -> str:
    """What is in the place of a text, or what else the record has."""
    if value is not None:
        return type(value).__name__
    names = [str(name)[:40] for name in record]
    others = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"nothing in a record of {others}; --text-field names another" if names else "nothing"


def _decoded_file(content: bytes) -> str:
    encoding = wide_encoding(content)
    if encoding:
        raise _NoDocument(f"{encoding}, where UTF-8 is read")
    return _decoded(content)


def _decoded(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise _NoDocument(f"invalid UTF-8 at byte {error.start}") from error


def _inside(row: object, field: str) -> object:
    """`meta.pile_set_name` of {"meta": {"pile_set_name": "Wikipedia"}}; None if absent.

    A name with dots in it goes before the way inwards, and JSON kept as text is looked into.
    """
    if isinstance(row, str | bytes) and row.lstrip()[:1] in ("{", b"{"):
        try:
            row = json.loads(row)
        except (ValueError, RecursionError):
            return None
    if not isinstance(row, dict):
        return None
    if field in row:
        return row[field]
    name, dot, rest = field.partition(".")
    return _inside(row.get(name), rest) if dot else None


def _check_text(text: str) -> None:
    if not text.strip():
        raise _NoDocument("empty document")
    if "\0" in text:
        raise _NoDocument("NUL byte")
    if len(text) * 4 > corpus.MAX_DOCUMENT_BYTES or not text.isascii():
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise _NoDocument(f"lone surrogate at character {error.start}") from error
        if size > corpus.MAX_DOCUMENT_BYTES:
            raise _NoDocument(f"longer than {corpus.MAX_DOCUMENT_BYTES} bytes")


def _printable(content: bytes | dict) -> str:
    """The unit as text for the rejects file, undecodable bytes as \\x.., at most 1 MiB of it."""
    if isinstance(content, dict):
        content = json.dumps(content, default=repr).encode()
    return content[: 2**20].decode("utf-8", "backslashreplace")
