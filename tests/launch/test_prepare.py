"""The command as a user runs it: what it writes, what it says, and how it ends."""

import json
from pathlib import Path

import numpy as np
import pytest

from data.dataset import open_dataset
from data.index import TokenFile
from data.tokenizer import load_tokenizer
from tests.data.conftest import make_texts, write_jsonl, write_tokens
from tests.launch.running import refused, succeeds

VERB = "launch/prepare.py"


def prepare(*arguments: object) -> str:
    """What the verb prints."""
    return succeeds(VERB, *arguments).stdout


@pytest.fixture(scope="module")
def builtin(tmp_path_factory) -> Path:
    prefix = tmp_path_factory.mktemp("builtin") / "demo"
    prepare(
        *("--corpus", "builtin", "--train-tokenizer", "sentencepiece", "--vocab-size", 1024),
        *("--sample-mb", 2, "--output", prefix),
    )
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
    prepare(
        *("--input", tmp_path / "*.jsonl", "--tokenizer", tokenizer.path),
        *("--output", tmp_path / "out", "--workers", 2),
    )
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
        (["--input", __file__, "--tokenizer", "x", "--workers", "0"], "--workers: 0 is out of"),
        (["--input", __file__, "--tokenizer", "x", "--max-rejects", "5"], "--max-rejects: 5.0 is"),
        ([], "one of the arguments --input --corpus is required"),
    ],
)
def test_mistakes_end_with_status_2_and_one_message(tmp_path, arguments, message):
    assert message in refused(VERB, *arguments, "--output", tmp_path / "out")
    assert not list(tmp_path.iterdir())


CONFIG = {
    "model": {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 384},
    "data": {"sequence_length": 32},
    "train": {"steps": 5, "global_batch_size": 4, "seed": 7},
    "evaluate": {"batches": 1},
}


@pytest.fixture
def corpus(tmp_path, tokenizer) -> Path:
    texts = make_texts(80)
    write_jsonl(tmp_path / "a.jsonl", [*texts[:50], texts[0]], "First")
    write_jsonl(tmp_path / "b.jsonl", texts[50:], "Second")
    prepare(
        *("--input", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--tokenizer", tokenizer.path),
        *("--output", tmp_path / "x"),
    )
    return tmp_path / "x"


def test_show_prints_a_steps_sequences(corpus, tokenizer, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(CONFIG))
    printed = prepare(
        *("show", "--config", tmp_path / "c.json", "--set", f"data.path={corpus}"),
        *("--set", "data.validation_fraction=0.2", "--step", 3, "--rows", 4),
        *("--run-dir", tmp_path / "r"),
    )
    expected = open_dataset(str(corpus), 32, 7, 20, split=0.2)
    head, *samples = printed.split("\n\nsample ")
    assert head.startswith("step 3: samples 12 to 15, 4 x 33 tokens, sha256 ")
    for number, text in zip(range(12, 16), samples, strict=True):
        shown = "\n".join(line[4:] for line in text.splitlines() if line.startswith("  | "))
        assert shown == tokenizer.decode(expected[number])
        places = [line.strip() for line in text.splitlines()[1:] if not line.startswith("  | ")]
        for line, piece in zip(places, expected.pieces(number), strict=True):
            subset = "First" if piece.document < 51 else "Second"
            length = piece.file.lengths[piece.document]
            assert line == (
                f"[{subset}] {corpus} document {piece.document}, "
                f"tokens {piece.start} to {piece.stop - 1} of {length}"
            )


def test_show_answers_for_preshuffled_files(tmp_path, tokenizer):
    """Which batch was step k: rows [4k, 4(k+1)) of the file, whoever wrote it."""
    rows = [tokenizer.encode(f"row {i:02d} " + "the a " * 40)[:33] for i in range(25)]
    write_tokens(tmp_path / "x", rows)
    (tmp_path / "c.json").write_text(json.dumps(CONFIG))
    printed = prepare(
        *("show", "--config", tmp_path / "c.json", "--set", f"data.path={tmp_path / 'x'}"),
        *("--set", "data.order=preshuffled", "--set", "data.validation_fraction=0.2"),
        *("--set", f"tokenizer.path={tokenizer.path}", "--step", 2, "--run", tmp_path / "r"),
    )
    assert [line[4:10] for line in printed.splitlines() if line.startswith("  | ")] == [
        "row 08",
        "row 09",
        "row 10",
        "row 11",
    ]


def test_a_step_past_the_end_is_a_mistake(corpus, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(CONFIG))
    told = refused(
        *(VERB, "show", "--config", tmp_path / "c.json", "--set", f"data.path={corpus}"),
        *("--step", 10**6, "--run", tmp_path / "r"),
    )
    assert "--step 1000000: the training set has steps 0 to" in told


def test_stats_count_subsets_lengths_and_duplicates(corpus):
    printed = prepare("stats", corpus)
    tokens = TokenFile(corpus)
    assert f"81 documents, {len(tokens.tokens):,} tokens (uint16), as its manifest says" in printed
    rows = {line.split()[0]: line.split()[1:3] for line in printed.splitlines() if line}
    assert rows["First"] == ["51", f"{tokens.lengths[:51].sum():,}"]
    assert rows["Second"] == ["30", f"{tokens.lengths[51:].sum():,}"]
    short = ((tokens.lengths >= 8) & (tokens.lengths <= 15)).sum()
    assert f"8 to 15{short:>29}" in printed
    assert f"duplicates: 1 documents ({tokens.lengths[0]} tokens)" in printed


def test_stats_notice_damage(corpus):
    content = bytearray(Path(f"{corpus}.bin").read_bytes())
    content[50] ^= 1
    Path(f"{corpus}.bin").write_bytes(content)
    assert "its content is not what" in refused(VERB, "stats", corpus)


def test_features_from_a_folder(tmp_path):
    for feature in ("one", "two"):
        (tmp_path / "in" / feature).mkdir(parents=True)
        for i in range(20):
            text = "".join(make_texts(30, seed=i + 100 * (feature == "two")))
            (tmp_path / "in" / feature / f"{i}.txt").write_text(text)
    out = tmp_path / "set.jsonl"
    arguments = ("features", "--input", tmp_path / "in", "--by", "folder", "--output", out)
    prepare(*arguments, "--passages", 10)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["feature"] for row in rows] == ["one"] * 10 + ["two"] * 10
    refused(VERB, *arguments, "--group", "nonsense")
