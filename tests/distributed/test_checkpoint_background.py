"""A checkpoint written while training goes on holds the moment it was taken, and hides no failure.

The writing threads are held back until training has moved on, so that every tensor which was not
copied would show.
"""

import threading
from contextlib import contextmanager

import pytest

from launch import checkpoint
from launch.checkpoint import folders
from launch.checkpoint.tensorfile import TensorFile, WritingThread
from tests.distributed.checkpointing import (
    differences,
    everything,
    folder_of,
    make_config,
    running,
    train,
)
from tests.distributed.processes import run_on_processes
from tests.distributed.test_checkpoint_refusals import full_disk, message

SETTINGS = {
    "zero-0": {"zero": 0},
    "zero-1 bf16": {"zero": 1, "dtype": "bf16"},
    "zero-3": {"zero": 3},
    "tensor": {"tensor": 2},
    "pipeline": {"pipeline": 2},
}
BEHIND = {"background": True}


@contextmanager
def held_back():
    """No checkpoint is written inside."""
    go_on, write = threading.Event(), WritingThread._write
    WritingThread._write = lambda self: (go_on.wait(), write(self))[1]
    try:
        yield
    finally:
        WritingThread._write = write
        go_on.set()


def save_and_go_on(folder: str, settings: list[dict]) -> list[dict]:
    outcomes = []
    for number, keys in enumerate(settings):
        said: list[str] = []
        config = make_config(**keys, checkpoint=BEHIND)
        run = folder_of(f"{folder}/{number}")
        with running(config) as engine:
            train(engine, 0, 4)
            with checkpoint.Saver(engine, run, None, said.append) as saver:
                with held_back():
                    saver.save({"step": 4, "tokens": 0})
                    before = everything(engine)
                    train(engine, 4, 2)
                    unfinished = folders.checkpoints(run) == []
                moved = len(differences(before, everything(engine)))
        with running(config) as engine:
            found = checkpoint.find_resumable(run.parent, "auto")
            checkpoint.load(engine, found)
            outcome = {"said": said, "unfinished": unfinished, "moved": moved}
            outcomes.append(outcome | {"differences": differences(before, everything(engine))})
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> list[list[dict]]:
    folder = tmp_path_factory.mktemp("background")
    return run_on_processes(save_and_go_on, 2, folder, str(folder), list(SETTINGS.values()))


@pytest.mark.parametrize("setting", SETTINGS)
def test_it_holds_the_moment_it_was_taken(outcomes, setting):
    for ranks in outcomes:
        outcome = ranks[list(SETTINGS).index(setting)]
        assert outcome["unfinished"]
        assert outcome["moved"] > 0
        assert outcome["differences"] == []
        (told,) = outcome["said"]
        assert "step_0000004 written in" in told
        assert "training was held up for" in told


def fail_behind(folder: str) -> dict:
    """The second rank's disk is full; training goes on, and the next save tells it."""
    import torch.distributed as dist

    said: list[str] = []
    run = folder_of(folder)
    with (
        running(make_config(checkpoint=BEHIND)) as engine,
        checkpoint.Saver(engine, run, None, said.append) as saver,
    ):
        saver.save({"step": 1, "tokens": 0})
        saver.wait()
        write = TensorFile._write
        if dist.get_rank() == 1:
            TensorFile._write = full_disk
        saver.save({"step": 2, "tokens": 0})
        losses = train(engine, 0, 2)
        raised = message(lambda: saver.save({"step": 3, "tokens": 0}))
        TensorFile._write = write
        dist.barrier()
        saver.save({"step": 3, "tokens": 0})
    kept = [path.name for path in folders.checkpoints(run)]
    found = {"said": said[1], "raised": raised, "losses": losses, "kept": kept}
    return found | {"outcomes": [outcome(folder, *case) for case in GIVING_UP]}


# Whether it saves in the background; steps of saves, those that fail; at which the run gives up.
GIVING_UP = [
    (False, (1, 3, 4), (1, 3, 4), 4),
    (False, (1, 2, 3, 5), (1, 3, 5), None),  # one that worked begins the count anew
    (True, (1, 3, 4, 5), (1, 3, 4, 5), 5),  # told by the save after it
]


def outcome(folder: str, background: bool, steps: tuple, failing: tuple, _: int | None) -> str:
    """What is raised, and by the save of which step, where `checkpoint.give_up` is 3 steps."""
    import torch.distributed as dist

    write, raised = TensorFile._write, "nothing"
    settings = {"background": background, "give_up": 3}
    with running(make_config(checkpoint=settings)) as engine:
        saver = checkpoint.Saver(engine, folder_of(f"{folder}/{steps}{background}"), None, str)
        for step in steps:
            bad = step in failing and dist.get_rank() == 0
            TensorFile._write = full_disk if bad else write
            told = message(lambda step=step: saver.save({"step": step, "tokens": 0}, must=False))
            if told != "no error":
                raised = f"step {step}: {told}"
                break
            if saver.thread is not None:
                saver.thread.join()  # before the disk is another
        TensorFile._write = write
        dist.barrier()
    return raised


def test_a_full_disk_is_told_at_once_and_raised_at_the_next_save(tmp_path):
    for found in run_on_processes(fail_behind, 2, tmp_path, str(tmp_path)):
        assert "saving failed, training goes on" in found["said"]
        assert "No space left on device" in found["raised"]
        assert len(found["losses"]) == 2
        assert found["kept"] == ["step_0000003", "step_0000001"]
        for (_, _, _, end), raised in zip(GIVING_UP, found["outcomes"], strict=True):
            if end is None:
                assert raised == "nothing"
            else:
                assert raised.startswith(
                    f"step {end}: no checkpoint could be written since step 1 "
                    "(checkpoint.give_up = 3 steps)"
                )
                assert "No space left on device" in raised
