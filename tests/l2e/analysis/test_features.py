"""Feature files: what is read, and what a user is told about a bad one."""

import gzip
import json

import numpy as np
import pytest

from l2e.analysis.features import make_features, read_features


def write(path, records):
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def test_plain_and_gzipped_files_read_alike(tmp_path):
    records = [{"text": f"t{i}", "feature": "ab"[i % 2]} for i in range(6)]
    plain = read_features(write(tmp_path / "x.jsonl", records))
    zipped = read_features(write(tmp_path / "x.jsonl.gz", records))
    assert plain.texts == zipped.texts == [f"t{i}" for i in range(6)]
    assert plain.labels.tolist() == [0, 1] * 3
    assert plain.digest() == zipped.digest()


def test_empty_passages_are_left_out_aloud(tmp_path, capsys):
    records = [
        {"text": "x", "feature": "a"},
        {"text": " \n", "feature": "a"},
        {"text": "y", "feature": "b"},
    ]
    assert len(read_features(write(tmp_path / "x.jsonl", records))) == 2
    assert "1 empty passages left out (first: line 2)" in capsys.readouterr().out


def test_features_that_look_like_one_are_told(tmp_path, capsys):
    names = ("Perl", "Perl ", "perl", "\xe9t\xe9", "e\u0301te\u0301", "C")
    records = [{"text": str(i), "feature": name} for i, name in enumerate(names)]
    assert len(read_features(write(tmp_path / "x.jsonl", records)).names) == len(names)
    told = capsys.readouterr().out
    assert "the features 'Perl', 'Perl ', 'perl' differ in case, spaces or Unicode form" in told
    assert r"the features 'e\u0301te\u0301', '\xe9t\xe9' differ" in told
    with pytest.raises(ValueError, match="is a folder"):
        read_features(tmp_path)


def test_one_feature_is_refused(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"text": "x", "feature": "a"}] * 3)
    with pytest.raises(ValueError, match="at least two"):
        read_features(path)


def test_a_malformed_line_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "x", "feature": "a"}\n{"text": "x"}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_features(path)


GOOD = b'{"text": "x", "feature": "a"}\n{"text": "y", "feature": "b"}\n'


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"text": null, "feature": "a"}', r'"text" is \'null\''),
        (b'{"text": 7, "feature": "a"}', r'"text" is \'7\''),
        (b'{"text": "x", "feature": 7}', r'"feature" is \'7\''),
        (b'{"text": "x", "feature": null}', r'"feature" is \'null\''),
        (b'{"text": ["x"], "feature": "a"}', r'"text" is'),
        (b'{"text": "x", "feature": {"b": 1}}', r'"feature" is'),
        (b'{"text": "x", "feature": " "}', r'"feature" is empty'),
        (b'{"text": "\\ud83d", "feature": "a"}', r'"text" holds half of a surrogate pair'),
        (b'{"text": "x", "feature": "\\udc00"}', r'"feature" holds half of a surrogate pair'),
        (b'["x", "a"]', r"expected"),
        (b"[" * 100_000, r"expected"),
        (b"9" * 10_000, r"expected"),
        (b'{"text": "caf\xe9", "feature": "a"}', r"no UTF-8"),
        ('{"text": "x", "feature": "a"}'.encode("utf-16"), r"no UTF-8"),
    ],
)
def test_what_is_no_passage_is_told_with_file_and_line(tmp_path, line, told):
    for name, content in (("x.jsonl", GOOD + line), ("x.jsonl.gz", gzip.compress(GOOD + line))):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{path}, line 3: .*{told}"):
            read_features(path)


@pytest.mark.parametrize("hurt", ["cut", "damaged", "no gzip", "left over", "zeros", "empty"])
def test_a_hurt_gzip_file_is_told_with_its_line(tmp_path, hurt):
    random = np.random.default_rng(0)
    lines = [json.dumps({"text": str(random.random()), "feature": "ab"[i % 2]}) for i in range(99)]
    whole = gzip.compress("\n".join(lines).encode())
    content = {
        "cut": whole[: len(whole) // 2],
        "damaged": whole[:500] + b"\0" * 200 + whole[700:],
        "no gzip": GOOD,
        "left over": whole + b"garbage",
        "zeros": whole + bytes(len(whole)),  # a member that a broken copy lost
        "empty": b"",
    }[hurt]
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path}, line \d+: the gzip file is cut or damaged"):
        read_features(path)


def test_gzip_is_told_by_content_and_byte_order_marks_are_passed_over(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + GOOD + b"\xef\xbb\xbf" + GOOD))  # cat a b
    assert read_features(path).texts == ["x", "y"] * 2
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="holds no passage"):
        read_features(path)


def test_copies_are_told_and_counted(tmp_path, capsys):
    records = [{"text": t, "feature": f} for t, f in ("xa", "yb", "xa", "xb", "za")]
    features = read_features(write(tmp_path / "x.jsonl", records))
    assert features.text_of.tolist() == [0, 1, 0, 0, 2]
    assert features.subset(np.array([1, 3, 4])).text_of.tolist() == [0, 1, 2]
    said = capsys.readouterr().out
    assert "2 passages are copies of another one; 1 texts stand under more than one feature" in said


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_features(tmp_path / "none.jsonl")


def test_sample_keeps_the_share_of_each_feature():
    features = make_features("x", [str(i) for i in range(30)], ["a"] * 20 + ["b"] * 10)
    sample = features.sample(5)
    assert sample.counts() == {"a": 5, "b": 5}
    assert all(text in features.texts for text in sample.texts)
    assert sample.texts == features.sample(5).texts
    assert np.all(np.diff([int(text) for text in sample.texts]) > 0)


@pytest.mark.parametrize(
    "line",
    ['{"text": "a", "text": "b", "feature": "x"}', '{"text": "a", "feature": "x", "feature": "y"}'],
)
def test_a_passage_with_two_texts_or_features(tmp_path, line):
    """A JSON parser takes the last one in silence."""
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"text": "c", "feature": "x"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"line 2: .*is there twice"):
        read_features(path)
