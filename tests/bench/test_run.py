"""bench/run.py: what a page says of how its numbers were measured."""

import argparse

import pytest
import torch

from bench import run


def arguments(**keys):
    return argparse.Namespace(**{"rounds": 5, "pairs": 0, "dtype": None} | keys)


def test_commands_of_one_dtype_stand_beside_the_others_until_all_is_measured_anew():
    commands = {"train": "--only train --rounds 3", "layer": "--only layer --rounds 3"}
    run.write_down("train", arguments(pairs=9, dtype="bf16"), commands)
    assert commands == {
        "train": "--only train --rounds 3",
        "layer": "--only layer --rounds 3",
        "train bf16": "--only train --rounds 5 --pairs 9 --dtype bf16",
    }
    run.write_down("train", arguments(), commands)
    assert commands == {"train": "--only train --rounds 5", "layer": "--only layer --rounds 3"}


def test_shapes_of_another_dtype_keep_their_rows(monkeypatch):
    monkeypatch.setattr(run, "train", lambda work, _: {"dtype": work.dtype, "new": True})
    monkeypatch.setattr(run, "has_bf16", lambda device: device == torch.device("cpu"))
    before = [{"dtype": "fp32", "new": False}, {"dtype": "bf16", "new": False}]
    rows = run.training(torch.device("cpu"), arguments(dtype="bf16"), before)
    assert rows == [{"dtype": "fp32", "new": False}, {"dtype": "bf16", "new": True}]
    assert all(row["new"] for row in run.training(torch.device("cpu"), arguments(), before))
    monkeypatch.setattr(run, "has_bf16", lambda device: False)
    with pytest.raises(ValueError, match="--dtype bf16: not measured on this kind of machine"):
        run.training(torch.device("cpu"), arguments(dtype="bf16"), before)


@pytest.mark.parametrize("others", [[], ["--only", "layer"], ["--only", "train,layer"]])
def test_a_dtype_is_of_training_alone(monkeypatch, capsys, others):
    monkeypatch.setattr("sys.argv", ["run.py", "--dtype", "bf16", *others])
    with pytest.raises(SystemExit):
        run.parse_arguments()
    assert "--dtype is for `--only train`" in capsys.readouterr().err
