"""Every format gives the same documents, and every bad record is named, not dropped."""

import bz2
import gzip
import json
import lzma

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import zstandard

from data import corpus
from data.corpus import Fields, find_sources, read_units
from data.records import Record, Reject, parse
from tests.data.conftest import make_texts, write_jsonl

TEXTS = make_texts(150)
SUBSETS = ["Even" if i % 2 == 0 else "Odd" for i in range(len(TEXTS))]
FIELDS = Fields()


def records(*inputs, fields=FIELDS, skip=0) -> list[Record | Reject]:
    return [
        parse(unit, fields) for unit in read_units(find_sources([*map(str, inputs)]), fields, skip)
    ]


def jsonl() -> bytes:
    rows = [{"text": t, "meta": {"pile_set_name": s}} for t, s in zip(TEXTS, SUBSETS, strict=True)]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table() -> arrow.Table:
    meta = [{"pile_set_name": subset} for subset in SUBSETS]
    return arrow.table({"id": range(len(TEXTS)), "text": TEXTS, "meta": meta})


def zstd(content: bytes) -> bytes:
    """As the zstd command writes: with a checksum."""
    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


def two_frames(content: bytes) -> bytes:
    half = len(content) // 2
    return zstd(content[:half]) + zstd(content[half:])


def write_arrow(path, opener) -> None:
    with opener(str(path), table().schema) as writer:
        writer.write_table(table(), max_chunksize=40)


WRITERS = {
    "x.jsonl": lambda path: path.write_bytes(jsonl()),
    "no_end.jsonl": lambda path: path.write_bytes(jsonl().rstrip(b"\n")),
    "blank.jsonl": lambda path: path.write_bytes(jsonl().replace(b"}}\n", b"}}\r\n\n")),
    "x.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl())),
    "x.jsonl.xz": lambda path: path.write_bytes(lzma.compress(jsonl())),
    "x.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(jsonl())),
    "x.jsonl.zst": lambda path: path.write_bytes(zstd(jsonl())),
    "frames.jsonl.zst": lambda path: path.write_bytes(two_frames(jsonl())),
    "x.parquet": lambda path: parquet.write_table(table(), path, row_group_size=70),
    "x.arrow": lambda path: write_arrow(path, arrow.ipc.new_file),
    "stream.arrow": lambda path: write_arrow(path, arrow.ipc.new_stream),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_documents(tmp_path, name):
    WRITERS[name](tmp_path / name)
    found = records(tmp_path / name)
    assert [(r.text, r.subset) for r in found] == list(zip(TEXTS, SUBSETS, strict=True))
    assert records(tmp_path / name, skip=77) == found[77:]


def test_text_folders_are_a_document_a_file(tmp_path):
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "b.txt").write_text("second")
    (tmp_path / "books" / "a.txt.gz").write_bytes(gzip.compress(b"first"))
    (tmp_path / "books" / ".hidden").write_text("no")
    found = records(tmp_path)
    assert [(r.text, r.subset) for r in found] == [("first", "books"), ("second", "books")]


def test_hugging_face_data_sets_are_streamed(tmp_path):
    pytest.importorskip("datasets")
    write_jsonl(tmp_path / "train.jsonl", TEXTS)
    assert [r.text for r in records(f"hf:{tmp_path}")] == TEXTS


def test_patterns_are_read_in_order(tmp_path):
    for i in (2, 0, 1):
        write_jsonl(tmp_path / f"{i}.jsonl", [f"text {i}"])
    assert [r.text for r in records(tmp_path / "*.jsonl")] == ["text 0", "text 1", "text 2"]


def test_other_fields_can_be_named(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": {"b": "hello"}, "kind": "greeting"}\n')
    [record] = records(tmp_path / "x.jsonl", fields=Fields("a.b", "kind"))
    assert record == Record("hello", "greeting", str(tmp_path / "x.jsonl"), 1)


BAD_LINES = {
    b'{"meta": {}}': "field 'text': expected text, found nothing",
    b'{"text": null}': "field 'text': expected text, found nothing",
    b'{"text": 3}': "field 'text': expected text, found int",
    b'["text"]': "no JSON object but list",
    b'{"text": "cut': "broken JSON",
    b'{"text": "\xff\xfe"}': "invalid UTF-8 at byte 10",
    b'{"text": ""}': "empty document",
    b'{"text": " \\n "}': "empty document",
    b'{"text": "a\\u0000b"}': "NUL byte",
    b'{"text": "a\\ud800b"}': "lone surrogate at character 1",
    b"[" * 100_000: "broken JSON",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=[*BAD_LINES.values()])
def test_bad_records_are_named(tmp_path, line):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "also good"}\n')
    first, reject, last = records(path)
    assert (first.text, last.text) == ("good", "also good")
    assert reject.reason.startswith(BAD_LINES[line])
    assert (reject.source, reject.line) == (str(path), 2)
    assert reject.content == line.decode("utf-8", "backslashreplace")


def test_surrogate_pairs_are_no_reject(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "\\ud83d\\ude00"}\n')
    assert records(tmp_path / "x.jsonl")[0].text == "\N{GRINNING FACE}"


def test_bad_text_files_and_cells_are_named(tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    bad = arrow.array([b"ok", b"\xff"], arrow.binary()).view(arrow.string())
    parquet.write_table(arrow.table({"text": bad}), tmp_path / "z.parquet")
    reasons = [
        getattr(r, "reason", r.text if isinstance(r, Record) else "") for r in records(tmp_path)
    ]
    assert reasons == [
        "empty document",
        "invalid UTF-8 at byte 2",
        "ok",
        "field 'text': expected text, found invalid UTF-8",
    ]


@pytest.mark.parametrize("name", ["x.jsonl", "x.txt"])
def test_too_long_documents_are_rejected_unread(tmp_path, monkeypatch, name):
    """The limit is 2^31 - 1 bytes; a small one shows the same."""
    monkeypatch.setattr(corpus, "MAX_DOCUMENT_BYTES", 100)
    long, short = json.dumps({"text": "x" * 350}), json.dumps({"text": "short"})
    prose = "" if name == "x.jsonl" else "Not JSON lines.\n" * 3
    (tmp_path / name).write_text(f"{prose}{long}\n{short}\n")
    first, *rest = records(tmp_path / name)
    assert first.reason == "longer than 100 bytes"
    assert [r.text for r in rest] == (["short"] if name == "x.jsonl" else [])


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.xz", "x.jsonl.bz2", "x.jsonl.zst"])
@pytest.mark.parametrize("damage", [lambda c: c[: len(c) // 2], lambda c: b"nonsense" + c[8:]])
def test_damaged_compression_is_an_error(tmp_path, name, damage):
    """A cut file above all: it must not pass for a shorter corpus."""
    WRITERS[name](tmp_path / name)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(ValueError, match=r"damaged or unreadable after record \d+") as error:
        records(tmp_path / name)
    assert name in str(error.value)


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "stream.arrow"])
def test_damaged_tables_are_an_error(tmp_path, name):
    WRITERS[name](tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"nonsense"):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged or unreadable"):
            records(tmp_path / name)


def test_a_table_without_the_text_column_is_an_error(tmp_path):
    parquet.write_table(arrow.table({"body": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"has no column 'text', only body; .*--text-field"):
        records(tmp_path / "x.parquet")


@pytest.mark.parametrize("name", ["nowhere.jsonl", "*.nothing", "owner/name"])
def test_missing_inputs_are_an_error(tmp_path, name):
    with pytest.raises(ValueError, match=r"no such file, folder or pattern; .* hf:owner/name"):
        find_sources([str(tmp_path / name)])


def test_overlapping_inputs_are_an_error(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", TEXTS)
    with pytest.raises(ValueError, match="is named twice"):
        find_sources([str(path), str(tmp_path / "*.jsonl")])


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no files"):
        find_sources([str(tmp_path)])
