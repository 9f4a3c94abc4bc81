"""A run's data: opened as configured, and refused where a resumed run's has changed."""

import json

import pytest

import configs
from launch.training import data
from launch.training.position import Position, position_of
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
        return data.open_corpus(config, tmp_path, data.fetch(config, tmp_path), Position())

    return open_with


def test_training_and_validation_share_no_document(open_run):
    data = open_run()
    documents = [
        {piece.document for i in range(len(part)) for piece in part.pieces(i)}
        for part in (data.training, data.validation)
    ]
    assert documents == [set(range(80)), set(range(80, 100))]


def test_a_resumed_run_must_keep_its_data(open_run, capsys):
    known = json.loads(json.dumps(open_run().describe()))
    open_run("train.micro_batch_size=2").hold_against(known, print)
    open_run("train.seed=8").hold_against({}, print)  # nothing is known
    assert capsys.readouterr().out == ""
    for change, told in {
        "train.seed=8": r"train\.seed from 7 to 8",
        "data.sequence_length=31": r"data\.sequence_length from 32 to 31",
        "data.order=megatron": r"data\.order from neox to megatron",
        "data.validation_fraction=0.3": "the split between training and validation",
        "train.steps=5000": "the number of epochs",
    }.items():
        with pytest.raises(ValueError, match=told):
            open_run(change).hold_against(known, print)
    # Only the hash of the tokens can tell.
    with pytest.raises(ValueError, match="the tokens of the first samples"):
        open_run().hold_against(known | {"order_hash": "0" * 64}, print)
    del known["order_hash"]
    known["validation"]["documents"] = [90, 100]
    open_run().hold_against(known, print)
    assert "the validation set has changed" in capsys.readouterr().out


def test_refusing_builds_nothing(open_run, tmp_path):
    known = json.loads(json.dumps(open_run().describe()))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"train\.seed"):
        open_run("train.seed=8").hold_against(known, print)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("manifest", [None, "", "\0" * 20, "[]", "{", '{"data": {}}', "whole"])
def test_what_older_checkpoints_say_of_their_data(open_run, tmp_path, manifest, capsys):
    """Their run's manifest, or, copied out of the run or with a broken one, their configuration."""
    now = open_run()
    checkpoint = tmp_path / "checkpoints" / "step_0000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text('{"step": 3, "tokens": 384}')
    (checkpoint / "config.json").write_text(now.config.model_dump_json())
    if manifest == "whole":
        manifest = json.dumps({"data": now.describe()})
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    known = data.data_of(checkpoint, print)
    assert position_of(checkpoint) == Position(3, 12, 384)
    assert known["laid_out"] == [20]
    now.hold_against(known, print)
    with pytest.raises(ValueError, match=r"train\.seed from 7 to 8"):
        open_run("train.seed=8").hold_against(known, print)
    told = capsys.readouterr().out
    broken = manifest is not None and not manifest.startswith('{"')
    assert ("manifest.json cannot be read" in told) == broken


@pytest.mark.parametrize(
    ("key", "value"),
    [("step", "3"), ("step", None), ("tokens", -1), ("samples", 1.5), ("data", [1])],
)
def test_a_checkpoint_of_another_form_is_told_by_its_file(tmp_path, key, value):
    state = {"step": 3, "tokens": 384, "samples": 12, "data": {}} | {key: value}
    (tmp_path / "state.json").write_text(json.dumps(state))
    (tmp_path / "config.json").write_text('{"model": {}}')
    with pytest.raises(ValueError, match=f"{tmp_path / 'state.json'}: '{key}' is"):
        position_of(tmp_path)


def test_another_batch_size_keeps_the_order(open_run, tmp_path):
    """A run of batches of 4 is resumed with batches of 6, and needs more epochs than planned."""
    whole = open_run("train.steps=400")
    config = open_run("train.steps=400", "train.global_batch_size=6").config
    start = Position(3, 12, 384)
    assert start.after(5, whole.config) == Position(5, 20, 640)
    assert start.samples_needed(config) == 12 + 397 * 6
    resumed = data.open_corpus(config, tmp_path, whole.paths, start, whole.laid_out)
    resumed.hold_against(json.loads(json.dumps(whole.describe())), print)
    planned = len(whole.training)
    assert planned < 12 + 397 * 6 <= len(resumed.training)
    for i in (12, 13, planned - 1):
        assert (resumed.training[i] == whole.training[i]).all()
    # What comes after them are further epochs of the same documents, in another order.
    later = [resumed.training[i] for i in range(planned, planned + 20)]
    assert not any((later[i] == whole.training[i]).all() for i in range(20))
    assert {
        p.document for i in range(planned, 12 + 397 * 6) for p in resumed.training.pieces(i)
    } <= set(range(80))
    # Resumed once more, it is the same again.
    again = data.open_corpus(config, tmp_path, whole.paths, start, resumed.laid_out)
    assert again.laid_out == resumed.laid_out
    last = len(again.training) - 1
    assert (again.training[last] == resumed.training[last]).all()
    fewer = open_run("train.steps=4", "train.global_batch_size=6").config
    shorter = data.open_corpus(fewer, tmp_path, whole.paths, start, whole.laid_out)
    assert shorter.order_hash == whole.order_hash
