"""Small corpora for the data tests."""

import json
from pathlib import Path

import numpy as np
import pytest

from data.index import bin_path, idx_path, write_index
from data.tokenizer import SentencePieceTokenizer, train_sentencepiece

WORDS = ["the", "a", "neuron", "layer", "scale", "of", "reads", "token", "quickly", "ü", "日本"]


def make_texts(count: int, seed: int = 0) -> list[str]:
    random = np.random.RandomState(seed)
    return [" ".join(random.choice(WORDS, random.randint(1, 60))) + ".\n" for _ in range(count)]


def write_jsonl(path: Path, texts: list[str], subset: str = "Test") -> Path:
    rows = [{"text": text, "meta": {"pile_set_name": subset}} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_tokens(prefix: Path, documents: list, dtype=np.uint16) -> str:
    """A .bin/.idx pair of these documents; returns its prefix."""
    arrays = [np.asarray(document, dtype) for document in documents]
    bin_path(prefix).write_bytes(b"".join(array.tobytes() for array in arrays))
    write_index(idx_path(prefix), np.dtype(dtype), np.array([len(a) for a in arrays], np.int32))
    return str(prefix)


def random_documents(count: int, seed: int = 0, vocabulary: int = 500) -> list:
    random = np.random.RandomState(seed)
    lengths = random.randint(1, 61, count)
    return [random.randint(0, vocabulary, length) for length in lengths]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> SentencePieceTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    return train_sentencepiece(make_texts(200), path, 320)
