"""What a file is: never read as something else, whatever its name."""

import bz2
import gzip
import json
import os
import re
import shlex
import socket
import zipfile

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from data.corpus import Fields, find_sources, read_units
from data.formats import judge
from data.records import parse
from tests.data.conftest import make_texts

TEXTS = make_texts(60)
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def texts(*paths) -> list[str]:
    units = read_units(find_sources([*map(str, paths)]), Fields())
    return [parse(unit, Fields()).text for unit in units]


JSON_LINES_NAMES = {
    "upper.JSONL": LINES,
    "shard.jl": LINES,
    "x.NDJSON.BZ2": bz2.compress(LINES),
    "x.jsonlines": LINES,
    "x.jsonl.gzip": gzip.compress(LINES),
    "x.jsonl-00000-of-00008": LINES,
    "x.jsonl.0001": LINES,
    "x.json.part1": LINES,
    "x.jsonl.gz-00000-of-00008": gzip.compress(LINES),
    "x.00001-of-00002.Json.Gz": gzip.compress(LINES),
    "part-00000": LINES,  # by its content
    "x.txt": LINES,
    "blob": gzip.compress(LINES),
    "bom.data": b"\xef\xbb\xbf" + LINES,
}


@pytest.mark.parametrize("name", JSON_LINES_NAMES)
def test_json_lines_by_any_name(tmp_path, name) -> None:
    (tmp_path / name).write_bytes(JSON_LINES_NAMES[name])
    assert texts(tmp_path / name) == TEXTS


def test_tables_without_an_ending_are_tables(tmp_path) -> None:
    parquet.write_table(arrow.table({"text": TEXTS}), tmp_path / "0001")
    with arrow.ipc.new_file(str(tmp_path / "cache"), arrow.schema({"text": arrow.string()})) as out:
        out.write_table(arrow.table({"text": TEXTS}))
    assert texts(tmp_path / "0001") == texts(tmp_path / "cache") == TEXTS


@pytest.mark.parametrize(
    "text",
    [
        "Roses are red,\nviolets are blue,\nand so on,\n",
        "One sentence, with a comma.\n\nAnother one, with a comma.\n",
        "def f(a, b):\n\treturn a, b\n",
        '{\n  "text": "pretty"\n}\n',
        "[section]\nkey = value\n",
        "# Title\n\n| a | b |\n|---|---|\n| 1 | 2 |\n",
        "BZh is how a bzip2 file begins\n",
        "\ufeffa mark, then prose\n",
        "<p>a paragraph</p>\n",
        "word",
        "apple,pear\nplum,fig\n",
    ],
)
@pytest.mark.parametrize("name", ["x.txt", "noending", "x.py"])
def test_prose_and_code_stay_text(tmp_path, text, name) -> None:
    (tmp_path / name).write_text(text)
    assert judge(tmp_path / name) == ("text", "")
    assert texts(tmp_path / name) == [text.removeprefix("\ufeff")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a table's.csv", b'id,text\n0,"one, and\na line"\n1,two\n'),
        ("table.csv", b"id;text\n0;one, and more\n1;two\n"),
        ("table.tsv.gz", gzip.compress(b"id\ttext\n0\tone, and more\n1\ttwo\n", mtime=0)),
    ],
)
def test_a_tables_advice_converts_it(tmp_path, name, content) -> None:
    """From any folder, by whatever separates its cells, whatever is in its name."""
    path = tmp_path / "in" / name
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is a table") as refused:
        find_sources([str(path)])
    command = shlex.split(re.search(r"by (python .*) \(what is prose", str(refused.value))[1])
    assert command[:2] == ["python", "-c"]
    exec(command[2], {})
    first = texts(path.with_name(name + ".parquet"))[0]
    assert first in ("one, and\na line", "one, and more")


def test_what_looks_like_a_table_can_be_named_as_prose(tmp_path) -> None:
    (tmp_path / "verse.txt").write_text("one;two things\nthree;four more\n")
    with pytest.raises(ValueError, match=r"what is prose after all is named \.md"):
        find_sources([str(tmp_path / "verse.txt")])
    (tmp_path / "verse.txt").rename(tmp_path / "verse.md")
    assert texts(tmp_path / "verse.md") == ["one;two things\nthree;four more\n"]


def test_templates_are_text_by_their_own_names(tmp_path) -> None:
    (tmp_path / "page.html").write_text("<!DOCTYPE html><p>a page</p>")
    assert texts(tmp_path / "page.html") == ["<!DOCTYPE html><p>a page</p>"]


LFS = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 1234567\n"
)
XML = b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>\n'
REFUSED = {
    "table.csv": (b"id,text\n0,hello\n", r"is a table \(CSV\).*pyarrow"),
    "table.TSV.gz": (gzip.compress(b"id\ttext\n0\thello\n"), r"is a table \(TSV\)"),
    "tabs.txt": (b"id\ttext\n0\thello there\n1\tand, more\n", r"is a table \(TSV\)"),
    "pandas": (b',text,label\n0,"a ""word"", two",x\n1,"b\nc",y\n', r"is a table \(CSV\)"),
    "german.dat": (b"id;text\n0;eins\n1;zwei\n", "CSV with semicolons"),
    "lfs.jsonl": (LFS, "is a Git LFS pointer.*git lfs pull"),
    "lfs.txt": (LFS, "is a Git LFS pointer"),
    "lfs.jsonl.gz": (LFS, "is a Git LFS pointer"),
    "lfs.parquet": (LFS, "is a Git LFS pointer"),
    "page.jsonl": (b"<!DOCTYPE html>\n<html>404</html>", "is a web page.*download the file"),
    "page.jsonl.gz": (b"\n<html><body>503</body>", "is a web page"),
    "page.parquet": (b"<HTML>", "is a web page"),
    "book.txt": (b"<html>sign in</html>", "is a web page"),
    "error.json": (XML, "XML message"),
    "really.jsonl": (gzip.compress(LINES), "compressed by gzip, which its name doesn't say"),
    "plain.jsonl.gz": (LINES, "is named .gz but is plain text"),
    "wrong.jsonl.zst": (gzip.compress(LINES), "is named .zst but begins as gzip"),
    "wide.jsonl": (LINES.decode().encode("utf-16"), "is UTF-16.*iconv"),
    "wide_no_mark.jsonl": (LINES.decode().encode("utf-16-le"), "is UTF-16"),
    "wide.jsonl.gz": (gzip.compress(LINES.decode().encode("utf-16")), "is UTF-16"),
    "wider.jsonl": (LINES.decode().encode("utf-32"), "is UTF-32"),
    "docs.7z": (b"7z\xbc\xaf\x27\x1c" + bytes(40), "7z archive"),
    "paper": (b"%PDF-1.7\n...", "a PDF document"),
    "crawl.warc.gz": (gzip.compress(b"WARC/1.0\r\nWARC-Type: response\r\n"), "a WARC archive"),
    "crawl.wet": (b"WARC/1.1\r\nWARC-Type: conversion\r\n", "a WARC archive"),
    "letter.rtf": (b"{\\rtf1\\ansi a letter}", "an RTF document"),
    "old.doc": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(500), "document of an old Office"),
    "zero.jsonl.zst": (b"", "is empty: 0 bytes are no zstd stream"),
    "zero.txt.XZ": (b"", "is empty: 0 bytes are no xz stream"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_at_once(tmp_path, name) -> None:
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "good.jsonl").write_bytes(LINES)
    with pytest.raises(ValueError, match=message) as error:
        find_sources([str(tmp_path)])
    assert f"input {tmp_path / name}: " in str(error.value)


def test_archives_are_refused(tmp_path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("x.jsonl", LINES)
    with pytest.raises(ValueError, match="is a zip archive; unpack"):
        find_sources([str(tmp_path / "x.zip")])


def test_parquet_by_another_name_or_compressed_as_a_whole(tmp_path) -> None:
    parquet.write_table(arrow.table({"text": TEXTS}), tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match=r"is named \.jsonl but begins as Parquet"):
        find_sources([str(tmp_path / "x.jsonl")])
    content = gzip.compress((tmp_path / "x.jsonl").read_bytes())
    (tmp_path / "x.parquet.gz").write_bytes(content)
    with pytest.raises(ValueError, match="compressed as a whole by gzip; decompress it"):
        find_sources([str(tmp_path / "x.parquet.gz")])


def test_pipes_and_sockets(tmp_path, monkeypatch) -> None:
    """Named, they are refused, for a source is read twice; in a folder they are passed over."""
    (tmp_path / "x.jsonl").write_bytes(LINES)
    os.mkfifo(tmp_path / "pipe.jsonl")
    with socket.socket(socket.AF_UNIX) as listening:
        monkeypatch.chdir(tmp_path)  # a socket's path may have 108 characters
        listening.bind("socket")
        assert texts(tmp_path) == TEXTS
    with pytest.raises(ValueError, match="is no regular file; write its content to one"):
        find_sources([str(tmp_path / "pipe.jsonl")])


def test_a_name_that_is_no_utf8(tmp_path) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9.jsonl"
    with open(name, "wb") as file:
        file.write(LINES)
    with pytest.raises(ValueError, match="its name is no UTF-8"):
        find_sources([str(tmp_path)])
