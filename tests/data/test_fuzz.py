"""Damaged files, hundreds of them: an error that names the file, or the right answer."""

import json
from pathlib import Path

import numpy as np
import pytest

from data.check import check
from data.corpus import Fields, find_sources, read_units
from data.dataset import open_dataset
from data.prepare import Preparation, prepare
from data.records import Record, parse
from l2e.problems import Problem
from tests.data.conftest import make_texts, random_documents, write_jsonl, write_tokens

VARIANTS = 400


def damaged(content: bytes, random: np.random.RandomState) -> bytes:
    """One of: a byte changed, bytes overwritten, cut out, put in, or the end missing."""
    place, count = random.randint(len(content)), random.randint(1, 17)
    noise = random.bytes(count)
    return [
        content[:place] + bytes([content[place] ^ (1 << random.randint(8))]) + content[place + 1 :],
        content[:place] + noise + content[place + count :],
        content[:place] + content[place + count :],
        content[:place] + noise + content[place:],
        content[:place],
        content[:place] + bytes(count) + content[place + count :],
    ][random.randint(6)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tokenizer) -> str:
    folder = tmp_path_factory.mktemp("fuzz")
    write_jsonl(folder / "in.jsonl", make_texts(60))
    sources = find_sources([str(folder / "in.jsonl")])
    prepare(Preparation(sources, tokenizer.path, str(folder / "x")))
    return str(folder / "x")


def test_prepared_files_are_refused_or_read_right(prepared, tokenizer):
    """With a manifest every damage shows: what opens has the original's order, to the token."""
    expected = open_dataset(prepared, 16, 1, 40).order_hash(40)
    random = np.random.RandomState(0)
    refused = 0
    for _ in range(VARIANTS):
        path = Path(f"{prepared}.{random.choice(['bin', 'idx', 'manifest.json'])}")
        original = path.read_bytes()
        path.write_bytes(damaged(original, random))
        problems = check(prepared, 16, 40, tokenizer=tokenizer.path, vocab_size=320)
        if problems:
            refused += 1
            assert (
                str(path.with_suffix("").with_suffix(""))
                in str(problems[0].value) + problems[0].reason
            )
        else:
            assert open_dataset(prepared, 16, 1, 40).order_hash(40) == expected
        path.write_bytes(original)
    assert refused > 0.8 * VARIANTS  # the rest hit parts of the manifest that say nothing of it


def test_foreign_indexes_are_refused_or_read_right(tmp_path):
    """Without a manifest an index must still fit itself and its tokens, or be refused."""
    prefix = write_tokens(tmp_path / "x", random_documents(40, vocabulary=40_000))
    expected = open_dataset(prefix, 16, 1, 40).order_hash(40)
    path = Path(f"{prefix}.idx")
    original, random = path.read_bytes(), np.random.RandomState(1)
    for _ in range(VARIANTS):
        path.write_bytes(damaged(original, random))
        problem = None
        try:
            found = open_dataset(prefix, 16, 1, 40).order_hash(40)
        except Problem as caught:
            problem = caught
        if problem is not None:
            assert prefix in str(problem.value)
        else:
            assert found == expected or check(prefix, 16, 40, vocab_size=40_000)


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.parquet"])
def test_sources_are_refused_or_read_record_by_record(tmp_path, name):
    """Only the damaged record may be lost, and it becomes a reject or, as JSON has no checksum,
    another text; what is compressed is refused as a whole."""
    from tests.data.test_corpus import TEXTS, WRITERS

    path = tmp_path / name
    WRITERS[name](path)
    original, random = path.read_bytes(), np.random.RandomState(2)
    for _ in range(VARIANTS // 8):
        path.write_bytes(damaged(original, random))
        message, found = "", []
        try:
            for unit in read_units(find_sources([str(path)]), Fields()):
                found.append(parse(unit, Fields()))
        except ValueError as error:
            message = str(error)
        assert not message or f"{path}: damaged or unreadable after record" in message
        texts = [record.text for record in found if isinstance(record, Record)]
        strange = [text for text in texts if text not in TEXTS]
        assert message or len(strange) <= 1
        json.dumps([tuple(record) for record in found])  # all of it can be reported
