"""A changed corpus, tokenizer, seed or length is refused, and named."""

import json

import numpy as np
import pytest

from data.dataset import open_dataset
from data.identity import refuse_changes
from tests.data.conftest import random_documents, write_tokens

SETTINGS = {"sequence_length": 16, "seed": 1, "samples": 50}


@pytest.fixture
def prefix(tmp_path) -> str:
    return write_tokens(tmp_path / "x", random_documents(60))


def stored(dataset) -> dict:
    """As a run's manifest holds it."""
    return json.loads(json.dumps({"training": dataset.identity(), "hash": dataset.order_hash(9)}))


def test_the_same_is_accepted(prefix):
    before = stored(open_dataset(prefix, **SETTINGS))
    refuse_changes(before, stored(open_dataset(prefix, **SETTINGS)))
    refuse_changes(before, stored(open_dataset(prefix, **{**SETTINGS, "samples": 40})))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 2}, r"train\.seed from 1 to 2"),
        ({"sequence_length": 17}, r"data\.sequence_length from 16 to 17"),
        ({"order": "megatron"}, r"data\.order from neox to megatron"),
        ({"samples": 500}, r"the number of epochs .* from 1 to \d"),
        ({"split": 0.1}, r"the split .* from \[0, 60\] to \[0, 54\]"),
    ],
)
def test_each_change_is_named(prefix, change, named):
    before = stored(open_dataset(prefix, **SETTINGS))
    with pytest.raises(ValueError, match=named):
        refuse_changes(before, stored(open_dataset(prefix, **{**SETTINGS, **change})))


def test_another_corpus_is_named(prefix, tmp_path):
    before = stored(open_dataset(prefix, **SETTINGS))
    other = write_tokens(tmp_path / "y", random_documents(61))
    with pytest.raises(ValueError, match=r"the corpus \(its \.idx file\) from [0-9a-f]{12}"):
        refuse_changes(before, stored(open_dataset(other, **SETTINGS)))


def test_other_tokens_of_the_same_lengths_are_noticed(prefix, tmp_path):
    """Without a manifest the index is the same: the hash of the first samples tells."""
    before = stored(open_dataset(prefix, **SETTINGS))
    documents = [document ^ 1 for document in random_documents(60)]
    other = write_tokens(tmp_path / "y", documents)
    with pytest.raises(ValueError, match="hash from"):
        refuse_changes(before, stored(open_dataset(other, **SETTINGS)))


def test_a_file_of_a_blend_is_named(prefix, tmp_path):
    other = write_tokens(tmp_path / "y", [np.arange(40)] * 30)
    before = stored(open_dataset({prefix: 1, other: 1}, **SETTINGS))
    write_tokens(tmp_path / "y", [np.arange(41)] * 30)
    with pytest.raises(ValueError, match=r"changed: .*file 2: the corpus \(its \.idx") as error:
        refuse_changes(before, stored(open_dataset({prefix: 1, other: 1}, **SETTINGS)))
    assert "file 1" not in str(error.value)
    with pytest.raises(ValueError, match=r"the weights of data\.path"):
        refuse_changes(before, stored(open_dataset({prefix: 1, other: 3}, **SETTINGS)))
