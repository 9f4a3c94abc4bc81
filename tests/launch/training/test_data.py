"""A run's data: opened as configured, and refused where a resumed run's has changed."""

import json

import pytest

import configs
from launch.training import data
from tests.data.conftest import random_documents, write_tokens

CONFIG = {
    "model": {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 512},
    "data": {"sequence_length": 32, "validation_fraction": 0.2},
    "train": {"steps": 5, "global_batch_size": 4, "seed": 7},
    "evaluate": {"batches": 2},
}


@pytest.fixture
def open_run(tmp_path):
    """Opens the data of a run in tmp_path, some keys overridden."""
    prefix = write_tokens(tmp_path / "x", random_documents(100))
    (tmp_path / "c.json").write_text(json.dumps(CONFIG))

    def open_with(*overrides: str) -> data.Corpus:
        config = configs.load(tmp_path / "c.json", [f"data.path={prefix}", *overrides])
        return data.open_corpus(config, tmp_path, data.fetch(config, tmp_path))

    return open_with


def test_training_and_validation_share_no_document(open_run):
    data = open_run()
    documents = [
        {piece.document for i in range(len(part)) for piece in part.pieces(i)}
        for part in (data.training, data.validation)
    ]
    assert documents == [set(range(80)), set(range(80, 100))]


def test_a_resumed_run_must_keep_its_data(open_run, tmp_path):
    data = open_run()
    data.refuse_changes(tmp_path)  # no run yet
    (tmp_path / "manifest.json").write_text(json.dumps({"data": data.describe()}))
    open_run("train.micro_batch_size=2").refuse_changes(tmp_path)
    with pytest.raises(ValueError, match=r"train\.seed from 7 to 8"):
        open_run("train.seed=8").refuse_changes(tmp_path)
    with pytest.raises(ValueError, match=r"data\.sequence_length from 32 to 31"):
        open_run("data.sequence_length=31").refuse_changes(tmp_path)
