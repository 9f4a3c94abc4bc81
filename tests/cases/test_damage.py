"""Damaged files: an error that names the file, never a shorter corpus."""

import bz2
import gzip
import json
import lzma
import os
import struct
import tracemalloc

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import zstandard

from data.compression import BY_NAME, decompress
from data.corpus import Fields, Source, find_sources, read_units
from data.records import parse
from launch import prepare as prepare_verb
from tests.data.conftest import make_texts, write_jsonl

TEXTS = make_texts(200)
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
COMPRESS = {
    "gz": lambda content: gzip.compress(content, mtime=0),
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def two_streams(ending: str) -> tuple[bytes, bytes]:
    half = LINES.index(b"\n", len(LINES) // 2) + 1
    return COMPRESS[ending](LINES[:half]), COMPRESS[ending](LINES[half:])


def read(path) -> list[str]:
    units = read_units(find_sources([str(path)]), Fields())
    return [parse(unit, Fields()).text for unit in units]


DAMAGE = {
    "whole": lambda first, second: first + second,
    "cut": lambda first, second: first + second[: len(second) // 2],
    "cut trailer": lambda first, second: first + second[:-3],
    "second's head": lambda first, second: first + b"\x55" * 8 + second[8:],
    "second's middle": lambda first, second: (
        first + second[: len(second) // 2] + b"\x55" * 9 + second[len(second) // 2 + 9 :]
    ),
    "zeros for the second": lambda first, second: first + bytes(len(second)),
    "left over": lambda first, second: first + second + b"garbage",
    "a few zeros": lambda first, second: first + second + bytes(4),
}


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_streams_are_whole_and_nothing_else(tmp_path, ending, damage) -> None:
    path = tmp_path / f"x.jsonl.{ending}"
    path.write_bytes(DAMAGE[damage](*two_streams(ending)))
    if damage == "whole" or (damage, ending) == ("a few zeros", "xz"):
        assert read(path) == TEXTS
    else:
        told = rf"{path}: damaged or unreadable after record \d+"
        if "zeros" in damage:
            told += r".*zeros after stream \d: padding, or what a copy lost"
        with pytest.raises(ValueError, match=told):
            read(path)


@pytest.mark.parametrize("between", [0, 4, 8, 508, "block"])
@pytest.mark.parametrize("after", [0, 4, 508, "block", "record of a tape"])
def test_the_padding_that_xz_allows_is_read(tmp_path, between, after) -> None:
    """Its manual: null bytes, a multiple of four, between the parts or after the last one."""
    blocks = {"block": 512, "record of a tape": 10240}
    content = b""
    for stream, zeros in zip(two_streams("xz"), (between, after), strict=True):
        content += stream
        block = blocks.get(zeros)
        content += bytes(zeros if block is None else -len(content) % block)
    path = tmp_path / "x.jsonl.xz"
    path.write_bytes(content)
    assert read(path) == TEXTS


@pytest.mark.parametrize("zeros", [1, 6, 511, 516, 2**14])
def test_other_zeros_after_an_xz_stream_may_be_a_lost_one(tmp_path, zeros) -> None:
    first, second = two_streams("xz")
    for content in (first + bytes(zeros), first + bytes(zeros) + second):
        path = tmp_path / "x.jsonl.xz"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{zeros} zeros after stream 1: padding, or what"):
            read(path)


@pytest.mark.parametrize("log", [28, 31])
def test_long_windows_are_read(tmp_path, log) -> None:
    """A frame with one raw block; the window's size is in the third byte of its header."""
    content = b'{"text": "far back"}\n'
    block = struct.pack("<I", len(content) << 3 | 1)[:3] + content
    (tmp_path / "x.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd\0" + bytes([(log - 10) << 3]) + block)
    assert read(tmp_path / "x.jsonl.zst") == ["far back"]


ARROW_STREAMS = {
    "whole": (lambda stream: stream, None),
    "without its end marker": (lambda stream: stream[:-8], "before its end marker"),
    "without its last batch": (lambda stream: stream[: -(len(stream) // 3)], "before its end m"),
    "marks alone": (lambda stream: stream[:4], "before its end marker"),
    "two streams": (lambda stream: stream + stream, "something follows the end"),
    "left over": (lambda stream: stream + b"garbage", "before its end marker"),
}


@pytest.mark.parametrize("damage", ARROW_STREAMS)
def test_arrow_streams_are_whole_and_nothing_else(tmp_path, damage) -> None:
    """A reader takes what is there as all there is: a killed writer's, or the first of two."""
    change, told = ARROW_STREAMS[damage]
    table = arrow.table({"text": TEXTS})
    path = tmp_path / "x.arrow"
    with arrow.OSFile(str(path), "wb") as file, arrow.ipc.new_stream(file, table.schema) as writer:
        for start in (0, 70, 140):
            writer.write_table(table.slice(start, 70))
    path.write_bytes(change(path.read_bytes()))
    if told is None:
        assert read(path) == TEXTS
    else:
        with pytest.raises(ValueError, match=f"{path}: damaged .*{told}"):
            read(path)


def cut(path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replace(path) -> None:
    path.with_name("new").write_bytes(path.read_bytes())
    path.with_name("new").replace(path)


def grow(path) -> None:
    with path.open("ab") as file:
        file.write(LINES)


@pytest.mark.parametrize("change", [cut, replace, grow])
@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl"])
def test_a_source_that_changes_while_it_is_read(
    tmp_path, prepare, monkeypatch, change, name
) -> None:
    """Half a file would be a corpus of half the documents, under the whole one's hash."""
    for source in ("a.jsonl", "b.jsonl"):
        (tmp_path / "pile" / source).parent.mkdir(exist_ok=True)
        (tmp_path / "pile" / source).write_bytes(LINES)
    hashed = Source.sha256

    def hash_then_change(source: Source) -> str | None:
        found = hashed(source)
        if source.name.endswith("b.jsonl"):  # the last one: now both are known
            change(tmp_path / "pile" / name)
        return found

    monkeypatch.setattr(Source, "sha256", hash_then_change)
    with pytest.raises(ValueError, match=rf"{name}: (was written to|damaged or unreadable)"):
        prepare("--input", tmp_path / "pile")
    assert not (tmp_path / "out.bin").exists()


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('{"text": "one", "text": "two"}', None),
        ('{"text": "one", "n": 1, "n": 2, "text": "one"}', None),
        ('{"meta": {"text": "a"}, "text": "the \\"text\\" itself"}', 'the "text" itself'),
        ('{"n": 1, "n": 2, "text": "one"}', "one"),
    ],
)
def test_a_record_that_names_two_texts(tmp_path, line, text) -> None:
    """A JSON parser takes the last one in silence."""
    (tmp_path / "x.jsonl").write_text(line + "\n")
    (unit,) = read_units(find_sources([str(tmp_path / "x.jsonl")]), Fields())
    found = parse(unit, Fields())
    if text is None:
        assert found.reason == "broken JSON: the key 'text' is there twice"
    else:
        assert found.text == text


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--output", name) for name in ("", " ", ".", "out/", "out/..", "hf:a/b", "n" * 250)),
        ("--input", ""),
        ("--shard", ""),
    ],
)
def test_names_that_an_unset_variable_leaves(tmp_path, monkeypatch, capsys, option, value) -> None:
    """An empty name is the folder one is in, no share is the whole, PREFIX/ writes hidden files."""
    (tmp_path / "x.jsonl").write_bytes(LINES)
    monkeypatch.chdir(tmp_path)
    words = {"--input": "x.jsonl", "--output": "out", "--tokenizer": "none"} | {option: value}
    for verb in ([], ["join", "x"]):
        if verb and option != "--output":
            continue
        kept = words if not verb else {"--output": value}
        with pytest.raises(SystemExit):
            prepare_verb.main([*verb, *sum(kept.items(), ())])
        assert f"argument {option}: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_skippable_frames_are_no_damage(tmp_path) -> None:
    """pzstd and seekable files have them before or after the others."""
    skippable = struct.pack("<II", 0x184D2A50, 4) + b"meta"
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(skippable + b"".join(two_streams("zst")) + skippable)
    assert read(path) == TEXTS


@pytest.mark.parametrize("name", ["gzip", "zstd"])
def test_repetitive_text_is_not_held_at_once(tmp_path, name) -> None:
    """256 MB that compress to little come out piece by piece."""
    size, ending = 2**28, BY_NAME[name].endings[0].removeprefix(".")
    path = tmp_path / "x"
    path.write_bytes(COMPRESS[ending](b'{"text": "again and again, it is"}\n' * (size // 35)))
    tracemalloc.start()
    with path.open("rb") as raw, decompress(raw, name) as stream:
        read = sum(len(piece) for piece in iter(lambda: stream.read(2**20), b""))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert read == size // 35 * 35
    assert peak < size / 2


def test_a_file_that_gives_nothing_is_named_beside_a_large_one(tmp_path, prepare) -> None:
    write_jsonl(tmp_path / "good.jsonl", TEXTS)
    for name, content, message in [
        ("empty.jsonl", b"", "holds no documents"),
        ("blank.jsonl", b"\n \n", "holds no documents"),
        ("array.json", b'[{"text": "a"},\n {"text": "b"}]', "one JSON array"),
        ("pretty.json", b'{\n  "text": "a"\n}\n', "over several lines"),
        ("error.json", b'{"error": "rate limit"}\n', "expected text, found nothing"),
        ("other.jsonl", b'{"Text": "a", "id": 1}\n', "in a record of Text, id; --text-field names"),
        ("mac.jsonl", b'{"text": "a"}\r{"text": "b"}\r', "end by carriage returns alone"),
        ("one_line.jsonl", b'{"text": "a"}{"text": "b"}', "first line holds several records"),
        ("commas.jsonl", b'{"text": "a"}, {"text": "b"}\n', "first line holds several records"),
        ("latin.txt", "naïve".encode("latin-1"), "invalid UTF-8 at byte 2"),
        ("wide.txt", "text".encode("utf-16"), "UTF-16, where UTF-8 is read"),
        ("empty.txt", b"", "empty document"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            prepare("--input", tmp_path / "good.jsonl", tmp_path / name)
        assert str(tmp_path / name) in str(error.value)


def test_empty_and_nested_tables_are_named(tmp_path, prepare) -> None:
    write_jsonl(tmp_path / "good.jsonl", TEXTS)
    for name, column, message in [
        ("empty", arrow.array([], arrow.string()), "holds no documents"),
        ("lists", arrow.array([["a", "b"], ["c"]]), "expected text, found list"),
        ("nulls", arrow.array([None, None], arrow.string()), "expected text, found nothing"),
    ]:
        path = tmp_path / f"{name}.parquet"
        parquet.write_table(arrow.table({"text": column}), path)
        with pytest.raises(ValueError, match=message) as error:
            prepare("--input", tmp_path / "good.jsonl", path)
        assert str(path) in str(error.value)


def test_one_bad_file_is_above_the_share_however_large_the_others(tmp_path, prepare) -> None:
    write_jsonl(tmp_path / "good.jsonl", TEXTS)
    write_jsonl(tmp_path / "some.jsonl", TEXTS[:20]).open("a").write("nonsense\n")
    with pytest.raises(ValueError, match=r"some\.jsonl: 1 of 21 records .* above --max-rejects"):
        prepare("--input", tmp_path / "good.jsonl", tmp_path / "some.jsonl")
    done = prepare("--input", tmp_path / "[gs]*.jsonl", "--max-rejects", 0.05)
    given = [(entry["documents"], entry["rejects"]) for entry in done.manifest["sources"]]
    assert given == [(200, 0), (20, 1)]


def test_a_few_bad_text_files_among_many_are_rejects(tmp_path, prepare) -> None:
    (tmp_path / "in").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "in" / f"{number}.txt").write_text(text)
    (tmp_path / "in" / "empty.txt").write_text("")
    done = prepare("--input", tmp_path / "in")
    assert done.manifest["documents"] == 200
    assert "1 records rejected (1 x empty document)" in done.printed


def test_byte_order_marks_are_no_text(tmp_path, prepare) -> None:
    mark = b"\xef\xbb\xbf"
    (tmp_path / "x.jsonl").write_bytes(mark + b'{"text": "one"}\n' + mark + b'{"text": "two"}\n')
    (tmp_path / "y.txt").write_bytes(mark + b"three")
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(mark + b"\n" + b'{"text": "four"}\n'))
    done = prepare("--input", *(tmp_path / name for name in ("x.jsonl", "y.txt", "z.jsonl.gz")))
    assert done.texts == ["one", "two", "three", "four"]


def test_fields_with_dots_binary_text_and_json_in_strings(tmp_path, prepare) -> None:
    nested = [{"text": "nested"}] * 2
    meta = [json.dumps({"pile_set_name": "A"}), '{"pile_set_name": "B"}']
    table = arrow.table(
        {
            "content": nested,
            "content.text": arrow.array([b"literal", "ünd".encode()], arrow.large_binary()),
            "meta": meta,
        }
    )
    parquet.write_table(table, tmp_path / "x.parquet")
    done = prepare("--input", tmp_path / "x.parquet", "--text-field", "content.text")
    assert done.texts == ["literal", "ünd"]
    assert list(done.manifest["subsets"]) == ["A", "B"]
    assert "subsets: 2 (A, B)" in done.printed
    lines = '{"a.b": "literal", "a": {"b": "nested"}}\n{"a": {"b": "nested"}}\n'
    (tmp_path / "x.jsonl").write_text(lines)
    done = prepare("--input", tmp_path / "x.jsonl", "--text-field", "a.b", output="second")
    assert done.texts == ["literal", "nested"]
    assert done.printed.count("no record names its subset in 'meta.pile_set_name'") == 1
