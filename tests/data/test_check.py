"""What is known to be wrong before a run starts; all of it at once."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from data import manifest
from data.check import check
from data.corpus import find_sources
from data.prepare import Preparation, prepare
from data.tokenizer import train_sentencepiece
from tests.data.conftest import make_texts, random_documents, write_jsonl, write_tokens


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tokenizer) -> str:
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "in.jsonl", make_texts(200))
    sources = find_sources([str(folder / "in.jsonl")])
    prepare(Preparation(sources, tokenizer.path, str(folder / "x")))
    return str(folder / "x")


def copy(corpus: str, tmp_path: Path) -> str:
    for path in Path(corpus).parent.glob("x.*"):
        shutil.copy(path, tmp_path)
    return str(tmp_path / "x")


def test_nothing_is_wrong_with_a_good_corpus(corpus, tokenizer):
    assert not check(corpus, 32, 50, tokenizer=tokenizer.path, vocab_size=tokenizer.vocab_size)
    assert not check({corpus: 0.5}, 32, 50, split=0.1)


def test_both_sides_of_a_split_must_give_samples(corpus):
    [problem] = check(corpus, 32, 50, split=0.0)
    assert "0 tokens in 0 documents are fewer than one sample" in problem.reason
    assert check(corpus, 32, 50, split=0.9999)


def test_a_split_of_rows_must_hold_what_validation_reads(tmp_path):
    prefix = write_tokens(tmp_path / "x", [np.arange(33)] * 20)
    assert not check(prefix, 32, 16, "preshuffled", split=0.2, validation_samples=4)
    [problem] = check(prefix, 32, 16, "preshuffled", split=0.2, validation_samples=5)
    assert "4 rows are fewer than the 5 samples" in problem.reason


def test_every_problem_is_told_at_once(corpus, tokenizer, tmp_path):
    bad = write_tokens(tmp_path / "bad", random_documents(30))
    Path(f"{bad}.idx").write_bytes(Path(f"{bad}.idx").read_bytes()[:-5])
    paths = {corpus: 1.0, bad: 1.0, str(tmp_path / "none"): 2.0}
    problems = check(paths, 10**6, 50, tokenizer=tmp_path / "none.json")
    assert [(p.key, str(p.value), p.reason.split(",")[0]) for p in problems] == [
        ("tokenizer", str(tmp_path / "none.json"), "no such file"),
        ("token file", corpus, problems[1].reason.split(",")[0]),
        ("token file", f"{bad}.idx", "truncated"),
        ("token file", f"{tmp_path / 'none'}.bin", "no such file"),
    ]
    assert "fewer than one sample" in problems[1].reason
    assert all(p.fix for p in problems)


def test_another_tokenizer(corpus, tmp_path):
    other = train_sentencepiece(make_texts(100, seed=9), tmp_path / "other.model", 310)
    [problem] = check(corpus, 32, 50, tokenizer=other.path)
    assert problem.key == "tokenizer.path"
    assert other.sha256[:12] in problem.reason
    assert str(manifest.recorded(corpus, "tokenizer_sha256"))[:12] in problem.reason


def test_a_tokenizer_whose_ids_the_file_cannot_hold(tmp_path, tokenizer):
    prefix = write_tokens(tmp_path / "x", random_documents(30, vocabulary=200), np.uint8)
    [problem] = check(prefix, 32, 20, tokenizer=tokenizer.path)
    assert problem.key == "tokenizer.path"
    assert "its ids go up to 319" in problem.reason
    assert "stores uint8, up to 255" in problem.reason


def test_a_tokenizer_larger_than_the_model(corpus, tokenizer):
    [problem] = check(corpus, 32, 50, tokenizer=tokenizer.path, vocab_size=300)[:1]
    assert (problem.key, problem.value) == ("model.vocab_size", 300)
    assert "set model.vocab_size to 320 or more" in problem.fix


@pytest.mark.parametrize(("dtype", "worst"), [(np.uint16, 700), (np.int32, 70_000), (np.int32, -1)])
@pytest.mark.parametrize("place", [0, 997, 1999])
def test_ids_outside_the_vocabulary_are_found(tmp_path, dtype, worst, place):
    tokens = np.arange(2000) % 500
    tokens[place] = worst
    prefix = write_tokens(tmp_path / "x", [tokens], dtype)
    [problem] = check(prefix, 32, 50, vocab_size=512)
    assert problem.reason == f"holds the id {worst}, outside a vocabulary of 512"


@pytest.mark.parametrize("end", ["bin", "idx"])
def test_content_that_is_not_the_manifests(corpus, tmp_path, end):
    """Even where the files would be read without complaint."""
    prefix = copy(corpus, tmp_path)
    content = bytearray(Path(f"{prefix}.{end}").read_bytes())
    content[100 if end == "bin" else -16] ^= 1
    Path(f"{prefix}.{end}").write_bytes(content)
    [problem] = check(prefix, 32, 50)
    assert str(problem.value) == f"{prefix}.{end}"


def test_a_damaged_manifest(corpus, tmp_path):
    prefix = copy(corpus, tmp_path)
    for content in ("{", "[]"):
        manifest.path(prefix).write_text(content)
        [problem] = check(prefix, 32, 50)
        assert str(problem.value) == str(manifest.path(prefix))
    manifest.path(prefix).unlink()
    os.mkfifo(manifest.path(prefix))
    [problem] = check(prefix, 32, 50)
    assert problem.reason == "is no regular file"


def test_too_few_rows_of_a_preshuffled_file(tmp_path):
    prefix = write_tokens(tmp_path / "x", [np.arange(33)] * 10)
    assert not check(prefix, 32, 10, "preshuffled")
    [problem] = check(prefix, 32, 11, "preshuffled")
    assert "10 rows are fewer than the 11 samples" in problem.reason


def test_the_manifest_is_json_with_what_was_promised(corpus):
    found = json.loads(manifest.path(corpus).read_text())
    promised = {"documents", "tokens", "rejects", "subsets", "bin_sha256", "tokenizer_sha256"}
    assert promised <= set(found)
    assert found["sources"][0]["sha256"]
