"""Logs on a full disk, in a folder that goes away, and behind a writer that has died."""

import io
import json
import os
import subprocess
import sys
from functools import partial
from operator import methodcaller
from pathlib import Path

import pytest

from launch.training import unfailing
from launch.training.bad_steps import BadSteps
from launch.training.logs import MetricsFile, TensorBoard
from launch.training.unfailing import Unfailing, UnfailingOutput, unfailing_output
from tests.distributed.checkpointing import make_config
from tests.launch import fleet
from tests.launch.running import ENVIRONMENT, ROOT


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_full_disk_is_told_once_and_nothing_is_missing_later(tmp_path: Path) -> None:
    """/dev/full is a disk without a free byte."""
    path, said = tmp_path / "metrics.jsonl", []
    path.symlink_to("/dev/full")
    log = Unfailing("metrics.jsonl", partial(MetricsFile, path), said.append)
    for step in (1, 2, 3):
        log.write(methodcaller("write", {"step": step}))
    assert len(said) == 1
    assert "metrics.jsonl cannot be written" in said[0]
    assert "No space left on device" in said[0]
    path.unlink()  # somebody made room
    log.write(methodcaller("write", {"step": 4}))
    assert steps(path) == [1, 2, 3, 4]
    assert "nothing of it is missing" in said[1]


def test_the_last_entries_are_written_at_the_end_or_said_to_be_lost(tmp_path: Path) -> None:
    """A run may have no later step to write them with."""
    for mended in (True, False):
        path, said = tmp_path / f"{mended}.jsonl", []
        path.symlink_to("/dev/full")
        log = Unfailing("metrics.jsonl", partial(MetricsFile, path), said.append)
        for step in (1, 2):
            log.write(methodcaller("write", {"step": step}))
        if mended:
            path.unlink()
        log.close()
        log.close()
        if mended:
            assert steps(path) == [1, 2]
            assert "nothing of it is missing" in said[-1]
        else:
            assert said[-1] == "metrics.jsonl cannot be written: its last 2 entries are lost"


def test_a_folder_that_goes_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, said = tmp_path / "run" / "metrics.jsonl", []
    path.parent.mkdir()
    log = Unfailing("metrics.jsonl", partial(MetricsFile, path), said.append)
    log.write(methodcaller("write", {"step": 1}))
    path.parent.rename(tmp_path / "elsewhere")
    log.write(methodcaller("write", {"step": 2}))
    monkeypatch.setattr(unfailing, "TELL_EVERY", 0.0)  # a minute later
    log.write(methodcaller("write", {"step": 3}))
    assert len(said) == 2
    assert "2 entries wait" in said[1]
    (tmp_path / "elsewhere").rename(path.parent)
    log.write(methodcaller("write", {"step": 4}))
    assert steps(path) == [1, 2, 3, 4]
    path.rename(tmp_path / "of before")
    path.write_text('{"step": 0}\n')  # another file under its name: the lines belong there
    log.write(methodcaller("write", {"step": 5}))
    log.write(methodcaller("write", {"step": 6}))
    assert steps(path) == [0, 5, 6]


def test_tensorboard_whose_folder_cannot_be_made(tmp_path: Path) -> None:
    folder, said = tmp_path / "tensorboard", []
    folder.write_text("a file is in the way")
    board = Unfailing("tensorboard", partial(TensorBoard, folder, 0), said.append)
    board.write(methodcaller("write", {"step": 1, "loss": 2.0}))
    assert "tensorboard cannot be written" in said[0]
    folder.unlink()
    board.write(methodcaller("write", {"step": 2, "loss": 2.0}))
    board.write(methodcaller("close"))
    assert list(folder.glob("events*"))


def record(step: int, loss: float = 2.0, norm: float | None = 1.0) -> dict:
    return {"step": step, "lm_loss": loss, "grad_norm": norm}


def test_steps_without_numbers_stop_the_run_or_are_counted() -> None:
    bad, said = float("nan"), []
    with pytest.raises(ValueError, match=r"loss is nan .* at step 2; its update was not made"):
        BadSteps(make_config(), said.append).judge([record(1), record(2, loss=bad)])
    skipping = make_config(train={"on_nonfinite": "skip", "nonfinite_limit": 2})
    steps = BadSteps(skipping, said.append)
    records = [record(1), record(2, norm=float("inf")), record(3, loss=bad), record(4)]
    steps.count(records)
    steps.judge(records)
    assert [one["dropped_steps"] for one in records] == [0, 1, 2, 2]
    assert len(said) == 2
    with pytest.raises(ValueError, match="nor were the 2 before it"):
        steps.judge([record(5, loss=bad), record(6, loss=bad), record(7, loss=bad)])
    found = [record(8), record(9, loss=bad)]
    with pytest.raises(ValueError, match=r"step 9; its .* \(NaN or Inf .* of blocks 2, 3\)"):
        BadSteps(make_config(), said.append).judge(found, {"2": 9, "3": 9})
    with pytest.raises(ValueError, match="a loss that is finite: steps 8 to 8"):  # never seen
        BadSteps(skipping, said.append).judge(found[:1], {"2": 8})
    # fp16's loss scale overflows by design; a bad loss is a bad loss.
    half = BadSteps(make_config(dtype="fp16"), said.append)
    half.judge([record(1, norm=float("inf"))])
    with pytest.raises(ValueError, match="loss is inf"):
        half.judge([record(2, loss=float("inf"))])


def test_output_that_cannot_be_written_stops_nobody(tmp_path: Path, monkeypatch) -> None:
    """A full disk, a closed pipe; what was lost is told when there is room again."""
    reading, writing = os.pipe()
    os.close(reading)
    with open("/dev/full", "w") as full, os.fdopen(writing, "w", buffering=1) as unread:
        for stream in (full, unread):
            output = UnfailingOutput(stream)
            for _ in range(3):
                output.write("x" * 2**14 + "\n")  # more than its buffer takes
            output.flush()
            assert output.lost
            lost, output.stream = output.lost, io.StringIO()
            output.write("there is room\n")
            told = f"({lost} pieces of output could not be written here)\nthere is room\n"
            assert output.stream.getvalue() == told
        # Nothing waits in the streams for the end of the process, where it would fail.
        monkeypatch.setattr("sys.stdout", full)
        monkeypatch.setattr("sys.stderr", unread)
        with unfailing_output():
            print("half a line", end="")
            print("half a line", end="", file=sys.stderr)


def test_a_run_that_nobody_listens_to(tmp_path: Path) -> None:
    """Its output's disk is full, and the number of its standard error free for other files."""
    config, run = fleet.write_config(tmp_path, train={"steps": 5}), tmp_path / "run"
    command = [sys.executable, fleet.VERB, "--config", config, "--run-dir", run]
    closed = ["sh", "-c", 'exec "$@" >/dev/full 2>&-', "sh", *map(str, command)]
    done = subprocess.run(closed, cwd=ROOT, env=ENVIRONMENT, timeout=300, check=False)
    assert done.returncode == 0
    assert steps(run / "metrics.jsonl") == [1, 2, 3, 4, 5]
    assert fleet.newest(run) == 5
