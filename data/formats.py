"""What a file is: by the ending of its name, and by its beginning where the name doesn't say.

A file whose name promises one thing and whose beginning shows another is refused rather than
read as either; so is what only looks like the wished file, such as a Git LFS pointer.
"""

import csv
import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

from data.compression import BY_NAME, COMPRESSIONS, DAMAGE, decompress
from l2e.problems import Problem

JSON_LINES, PARQUET, ARROW, TEXT = "jsonl", "parquet", "arrow", "text"
FORMATS = {
    ".jsonl": JSON_LINES,
    ".jsonlines": JSON_LINES,
    ".jl": JSON_LINES,
    ".ndjson": JSON_LINES,
    ".json": JSON_LINES,
    ".parquet": PARQUET,
    ".pq": PARQUET,
    ".arrow": ARROW,
}
DESCRIPTIONS = {
    JSON_LINES: "JSON lines, a record a line",
    PARQUET: "Parquet tables",
    ARROW: "Arrow tables",
    TEXT: "text, a document a file",
    "hf": "Hugging Face data sets, streamed",
    "builtin": "the built-in corpus",
}
# What numbers a data set's parts: x.jsonl-00000-of-00008, x.jsonl.0001, x.json.part1, x.jsonl_2.
PART = re.compile(r"[-_.](part[-_.]?)?\d+([-_.]?of[-_.]?\d+)?$")
HEAD = 2**16  # bytes of a file to judge it by
# Names that promise prose; a template or a web page may begin with markup under its own name.
PROSE_ENDINGS = ("", ".txt", ".text")
MARKUP = re.compile(rb"\s*<(!doctype\s+html|html|\?xml|error>)", re.IGNORECASE)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
ARROW_MARK = b"\xff\xff\xff\xff"  # before every message of an Arrow stream
# The longer mark first: that of UTF-16 begins it.
WIDE_MARKS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
TABLE_ENDINGS = {".csv": "CSV", ".tsv": "TSV", ".tab": "TSV", ".psv": "PSV"}
TABLE_SEPARATORS = {",": "CSV", "\t": "TSV", ";": "CSV with semicolons", "|": "PSV"}
# Names that say what text it is, whatever it looks like.
MARKUP_ENDINGS = (".md", ".markdown", ".rst", ".tex", ".html", ".htm", ".xml")
WORD = re.compile(r"[^\W\d]\w*")
COLUMN_NAME = re.compile(r"[^\W\d][\w .()/#-]{0,63}(?<! )")
TO_PARQUET = (
    "from pyarrow import csv, parquet; "
    "form = csv.ParseOptions(delimiter={separator!r}, newlines_in_values=True); "
    "parquet.write_table(csv.read_csv({table!r}, parse_options=form), {output!r})"
)
# Files that hold other files or data of their own, by how they begin.
CONTAINERS = {
    b"PK\x03\x04": "a zip archive",
    b"PK\x05\x06": "an empty zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"%PDF": "a PDF document",
    b"\x89HDF\r\n": "an HDF5 file",
    b"SQLite format 3": "an SQLite database",
    b"Obj\x01": "an Avro file",
    b"ORC": "an ORC file",
    b"\x93NUMPY": "a NumPy array",
    b"FEA1": "a Feather file of the first version",
    b"MMIDIDX": "an index of token files",
    b"\x04\x22\x4d\x18": "compressed by lz4",
    b"LZIP": "compressed by lzip",
    b"\x1f\x9d": "compressed by compress",
    b"WARC/": "a WARC archive of web pages",
    b"{\\rtf": "an RTF document",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "a document of an old Office",
}
LFS_POINTER = re.compile(rb"version https?://(git-lfs\.github\.com|hawser\.github\.com)/spec/")


class Kind(NamedTuple):
    """A file's format, one of `FORMATS` or `TEXT`, and its compression, "" for none."""

    format: str
    compression: str


def judge(path: Path) -> Kind:
    """What a regular file is. Raises ValueError for what can't be, or isn't, read."""
    format_, compression, ending = by_name(path.name)
    prose = not format_ and ending not in PROSE_ENDINGS
    try:
        with path.open("rb") as file:
            raw = file.read(HEAD)
    except OSError as error:
        raise Problem("input", path, f"can't be read ({error})", "repair it") from error
    _refuse_impostors(path, raw, may_be_markup=prose)
    compression = _compression(path, raw, format_, compression)
    head = raw
    if compression:
        head = beginning(path, compression)
        _refuse_impostors(path, head, may_be_markup=prose)
    if ending in TABLE_ENDINGS:
        _refuse_table(path, _table_of(_first_lines(head)) or TABLE_ENDINGS[ending])
    found = _table_format(head)
    if format_ == JSON_LINES:
        _refuse_unlike(path, head, found)
    if not format_ and ending in MARKUP_ENDINGS:
        format_ = TEXT
    format_ = format_ or found or _text_format(path, head)
    if compression and format_ in (PARQUET, ARROW):
        reason = f"is a table compressed as a whole by {compression}"
        raise Problem("input", path, reason, "decompress it: its columns are compressed inside")
    return Kind(format_, compression)


def by_name(name: str) -> tuple[str, str, str]:
    """Format and compression that a file's name says, "" where it says none, and its ending."""
    name = PART.sub("", name.lower())
    compression = compression_of(name)
    if compression:
        name = PART.sub("", name[: name.rindex(".")])
    ending = Path(name).suffix
    return FORMATS.get(ending, ""), compression, ending


def compression_of(name: str) -> str:
    """The compression that a file's ending says, "" for none."""
    ending = Path(name.lower()).suffix
    return next((c.name for c in COMPRESSIONS if ending in c.endings), "")


def wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32, where bytes are marked as such or every other one of them is NUL."""
    for mark, name in WIDE_MARKS.items():
        if head.startswith(mark):
            return name
    start = head[:64]
    odd, even = start[1::2], start[0::2]
    return "UTF-16" if len(odd) > 1 and (not any(odd) or not any(even)) and any(start) else None


def refuse_lfs_pointer(what: str, path: Path, head: bytes) -> None:
    """Raises ValueError for the few lines that Git LFS puts in a file's place."""
    if LFS_POINTER.match(head):
        reason = "is a Git LFS pointer, not the file itself"
        raise Problem(what, path, reason, "fetch it with `git lfs pull`, or download it again")


def beginning(path: Path, compression: str) -> bytes:
    """The first `HEAD` bytes of what a file holds, or nothing where they can't be read."""
    try:
        with path.open("rb") as raw:
            return decompress(raw, compression).read(HEAD).removeprefix(BYTE_ORDER_MARK)
    except (OSError, EOFError, *DAMAGE):
        return b""  # reading it as a corpus tells that, and where


def hint(head: bytes) -> str:
    """What a JSON-lines file without documents may be instead; "" where nothing shows."""
    if head.lstrip().startswith(b"["):
        return "it begins with '[': one JSON array, where a record a line is read; "
    if head.lstrip().split(b"\n", 1)[0].strip() == b"{":
        return "its records go over several lines, where a record a line is read; "
    if b"\r" in head and b"\n" not in head:
        return "its lines end by carriage returns alone, where line feeds are read; "
    if _holds_several(head.split(b"\n", 1)[0]):
        return "its first line holds several records, where a record a line is read; "
    return ""


def _refuse_impostors(path: Path, head: bytes, may_be_markup: bool) -> None:
    """Raises ValueError for what lies in a file's place, and for files that hold others."""
    refuse_lfs_pointer("input", path, head)
    head = head.removeprefix(BYTE_ORDER_MARK)
    if MARKUP.match(head) and not may_be_markup:
        line = head.strip().splitlines()[0][:60].decode("utf-8", "backslashreplace")
        raise Problem(
            "input",
            path,
            f"is a web page or an XML message ({line!r}), as servers send for errors",
            "download the file itself; a page that is meant as text is named .html or .xml",
        )
    name = next((name for magic, name in CONTAINERS.items() if head.startswith(magic)), None)
    if name or head[257:262] == b"ustar":
        reason = f"is {name or 'a tar archive'}"
        raise Problem("input", path, reason, "unpack or convert it, or leave it out")


def _compression(path: Path, raw: bytes, format_: str, named: str) -> str:
    """The compression of a file, where its name and its beginning agree."""
    is_text = _is_text(raw)
    found = next((c.name for c in COMPRESSIONS if raw.startswith(c.magic) and not is_text), "")
    if named and not raw:
        reason = f"is empty: 0 bytes are no {named} stream"
        raise Problem("input", path, reason, "get a whole copy, or leave it out")
    if named and named != found and (found or is_text):
        reason = f"is named {path.suffix} but {f'begins as {found}' if found else 'is plain text'}"
        fix = f"name it {BY_NAME[found].endings[0]}" if found else "take that ending off its name"
        raise Problem("input", path, reason, fix)
    if found and format_ and not named:
        reason = f"is compressed by {found}, which its name doesn't say"
        raise Problem("input", path, reason, f"add {BY_NAME[found].endings[0]} to its name")
    return named or found  # what begins as nothing known is damaged, which reading it tells


def _is_text(raw: bytes) -> bool:
    """Whether bytes, perhaps cut inside a character, are UTF-8 without control characters."""
    try:
        text = raw.decode("utf-8", "strict")
    except UnicodeDecodeError as error:
        if error.start < len(raw) - 3:
            return False
        text = raw[: error.start].decode()
    return bool(text.strip()) and not re.search("[\0-\x08\x0e-\x1a]", text)


def _refuse_table(path: Path, kind: str) -> None:
    separator = next(mark for mark, name in TABLE_SEPARATORS.items() if name == kind)
    output = path.with_name(path.name + ".parquet")
    code = TO_PARQUET.format(separator=separator, table=str(path), output=str(output))
    raise Problem(
        "input",
        path,
        f"is a table ({kind}); read are JSON lines, Parquet, Arrow and text",
        f"convert it, by python -c {shlex.quote(code)} (what is prose after all is named .md)",
    )


def _table_format(head: bytes) -> str:
    """Parquet or Arrow, where a file begins as these do, else ""."""
    if head.startswith(b"PAR1"):
        return PARQUET
    return ARROW if head.startswith((b"ARROW1", ARROW_MARK)) else ""


def _text_format(path: Path, head: bytes) -> str:
    """JSON lines or text. Raises ValueError for a table of text."""
    lines = _first_lines(head)
    if _are_records(lines):
        return JSON_LINES
    table = _table_of(lines)
    if table:
        _refuse_table(path, table)
    return TEXT


def _refuse_unlike(path: Path, head: bytes, found: str) -> None:
    """Raises ValueError for JSON lines by name that are something else by content."""
    encoding = wide_encoding(head)
    if found:
        reason = f"is named {path.suffix} but begins as {DESCRIPTIONS[found]} do"
        raise Problem("input", path, reason, f"name it .{found}")
    if encoding:
        fix = f"convert it: iconv -f {encoding} -t UTF-8"
        raise Problem("input", path, f"is {encoding}, where UTF-8 is read", fix)


def _first_lines(head: bytes) -> list[str]:
    """Up to a hundred whole lines of text, blank ones left out; none of what is no UTF-8."""
    lines = head.removeprefix(BYTE_ORDER_MARK).splitlines()
    if len(head) == HEAD and len(lines) > 1:
        del lines[-1]  # cut
    try:
        return [line.decode() for line in lines[:100] if line.strip()]
    except UnicodeDecodeError:
        return []


def _are_records(lines: list[str]) -> bool:
    """Whether at least half the lines are JSON objects, or begin one that is too long to see."""
    objects = sum(map(_is_record, lines))
    return bool(lines) and 2 * objects >= len(lines)


def _holds_several(line: bytes) -> bool:
    """Whether another object follows the first one of a line."""
    try:
        text = line.decode().lstrip()
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return text[end:].lstrip(" ,").startswith("{")


def _is_record(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return len(line) > HEAD // 2 and re.match(r'\s*\{\s*"', line) is not None


def _table_of(lines: list[str]) -> str | None:
    """CSV, TSV and the like, where lines are a header of names and rows of as many cells."""
    for separator, name in TABLE_SEPARATORS.items():
        try:
            header, *rows = csv.reader(lines, delimiter=separator)
        except (ValueError, csv.Error):
            continue
        # A table's first column may be its rows' numbers, without a name.
        names = header[1:] if not header[0] and separator == "," else header
        if not (all(map(COLUMN_NAME.fullmatch, names)) and len(set(header)) == len(header) > 1):
            continue
        whole = rows[:-1] or rows  # the last one may be cut
        if not whole or any(len(row) != len(header) for row in whole):
            continue
        # Without tabs, single words beside one another may be anything.
        cells = [cell for row in whole for cell in row]
        if separator == "\t" or not all(map(WORD.fullmatch, cells)):
            return name
    return None
