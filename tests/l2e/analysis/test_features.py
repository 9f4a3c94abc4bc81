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


def test_one_feature_is_refused(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"text": "x", "feature": "a"}] * 3)
    with pytest.raises(ValueError, match="at least two"):
        read_features(path)


def test_a_malformed_line_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "x", "feature": "a"}\n{"text": "x"}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_features(path)


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
