"""The command as a user runs it: what it writes, what it says, and how it ends."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.index import TokenFile
from data.tokenizer import load_tokenizer
from tests.data.conftest import make_texts, write_jsonl

ROOT = Path(__file__).resolve().parents[2]


def prepare(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "launch" / "prepare.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def builtin(tmp_path_factory) -> Path:
    prefix = tmp_path_factory.mktemp("builtin") / "demo"
    done = prepare(
        *("--corpus", "builtin", "--train-tokenizer", "sentencepiece", "--vocab-size", 1024),
        *("--sample-mb", 2, "--output", prefix),
    )
    assert done.returncode == 0, done.stderr
    return prefix


def test_builtin_corpus_needs_nothing(builtin):
    tokenizer = load_tokenizer(f"{builtin}.tokenizer.model")
    assert tokenizer.vocab_size == 1024
    train, held_out = TokenFile(builtin), TokenFile(f"{builtin}_validation")
    assert len(train.tokens) > 30 * len(held_out.tokens) > 100_000
    texts = {tokenizer.decode(train.read(i)[:-1]) for i in range(len(train))}
    library = Path(json.__file__)
    assert library.read_text() in texts  # a module, as it stands in the library
    assert any(text.startswith(json.__doc__.strip()) for text in texts)  # and its docstrings
    held_texts = {tokenizer.decode(held_out.read(i)[:-1]) for i in range(len(held_out))}
    assert not texts & held_texts


def test_jsonl_becomes_tokens_and_a_manifest(tmp_path, tokenizer):
    texts = make_texts(50)
    write_jsonl(tmp_path / "a.jsonl", texts[:30], "First")
    write_jsonl(tmp_path / "b.jsonl", texts[30:], "Second")
    done = prepare(
        *("--input", tmp_path / "*.jsonl", "--tokenizer", tokenizer.path),
        *("--output", tmp_path / "out", "--workers", 2),
    )
    assert done.returncode == 0, done.stderr
    tokens = TokenFile(tmp_path / "out")
    assert tokens.dtype == np.uint16
    found = [tokenizer.decode(tokens.read(i)[:-1]) for i in range(len(tokens))]
    assert found == texts
    assert all(tokens.read(i)[-1] == tokenizer.eod for i in range(len(tokens)))
    manifest = json.loads((tmp_path / "out.manifest.json").read_text())
    assert manifest["documents"] == 50
    assert manifest["tokens"] == len(tokens.tokens)
    assert {name: c["documents"] for name, c in manifest["subsets"].items()} == {
        "First": 30,
        "Second": 20,
    }
    assert sorted(path.name for path in tmp_path.glob("out*")) == [
        "out.bin",
        "out.idx",
        "out.manifest.json",
        "out.subsets",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "none.jsonl", "--tokenizer", "none.json"], "'none.jsonl': no such file"),
        (["--input", __file__, "--tokenizer", "none.json"], "tokenizer none.json: no such file"),
        (["--input", __file__], "--tokenizer: missing"),
        (["--input", __file__, "--tokenizer", "x", "--workers", "0"], "--workers 0"),
        (["--input", __file__, "--tokenizer", "x", "--max-rejects", "5"], "--max-rejects 5"),
        ([], "one of the arguments --input --corpus is required"),
    ],
)
def test_mistakes_end_with_status_2_and_one_message(tmp_path, arguments, message):
    done = prepare(*arguments, "--output", tmp_path / "out")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
