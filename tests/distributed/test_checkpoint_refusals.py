"""What cannot be saved or loaded is a message on every rank, and nothing is lost."""

import errno
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from launch import checkpoint
from launch.checkpoint import folders
from launch.checkpoint.tensorfile import TensorFile
from tests.distributed.checkpointing import (
    differences,
    everything,
    folder_of,
    make_config,
    running,
    train,
)
from tests.distributed.processes import run_on_processes


def message(work) -> str:
    try:
        work()
    except ValueError as error:
        return str(error)
    return "no error"


def full_disk(self, data) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "the disk")


def refuse(folder: str) -> dict:
    """Every refusal, on two ranks; files are changed by the first rank alone."""
    found: dict = {}
    run = folder_of(folder)
    first = dist.get_rank() == 0
    tokenizer = Path(folder) / "tokenizer.json"
    if first:
        tokenizer.write_text("{}")
    dist.barrier()
    with running(make_config(pipeline=2, checkpoint={"keep_last": 2})) as engine:
        train(engine, 0, 3)
        for step in (1, 2, 3):
            saved = checkpoint.save(engine, run, {"step": step, "tokens": 0}, tokenizer)
        found["kept"] = [path.name for path in folders.checkpoints(run)]

        original = TensorFile._write
        if not first:
            TensorFile._write = full_disk
        found["full disk"] = message(
            lambda: checkpoint.save(engine, run, {"step": 4, "tokens": 0}, tokenizer)
        )
        TensorFile._write = original
        dist.barrier()
        found["after full disk"] = sorted(path.name for path in run.iterdir())
        found["still resumable"] = checkpoint.find_resumable(Path(folder), "auto").name

        before = everything(engine)
        broken = Path(folder) / "broken" / "step_0000003"
        if first:
            shutil.copytree(saved, broken)
            path = next(
                path
                for path in broken.glob("model-*")
                if "embed_out.weight" in (tensors := load_file(path))
            )
            tensors["embed_up.weight"] = tensors.pop("embed_out.weight")
            save_file(tensors, path)
        dist.barrier()
        found["tensors"] = message(lambda: checkpoint.load(engine, broken))
        other = Path(folder) / "other" / "tokenizer.json"
        other.parent.mkdir(exist_ok=True)
        other.write_text("{ }")
        dist.barrier()
        found["tokenizer"] = message(lambda: checkpoint.load(engine, saved, other))
        found["untouched"] = differences(before, everything(engine))
    with running(make_config(model={"hidden_size": 64, "vocab_size": 512})) as engine:
        found["model"] = message(lambda: checkpoint.load(engine, saved))
    with running(make_config(optimizer={"type": "sgd"})) as engine:
        found["optimizer"] = message(lambda: checkpoint.load(engine, saved))
    return found


@pytest.fixture(scope="module")
def refusals(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("refusals")
    return run_on_processes(refuse, 2, folder, str(folder))


def test_full_disk_is_told_on_every_rank_and_costs_nothing(refusals):
    for found in refusals:
        assert "No space left on device" in found["full disk"]
        assert "checkpoints/step_0000004: " in found["full disk"]
        assert "Earlier checkpoints are untouched" in found["full disk"]
        assert found["after full disk"] == ["latest", "step_0000002", "step_0000003"]
        assert found["still resumable"] == "step_0000003"


def test_only_the_newest_are_kept(refusals):
    assert refusals[0]["kept"] == ["step_0000003", "step_0000002"]


def test_every_tensor_is_accounted_for(refusals):
    for found in refusals:
        assert "embed_out.weight is missing" in found["tensors"]
        assert "embed_up.weight is unknown to this model" in found["tensors"]
        assert "Nothing was loaded" in found["tensors"]
        assert found["untouched"] == []


def test_other_models_tokenizers_and_optimizers_are_refused(refusals):
    for found in refusals:
        assert "hidden_size is 32 there and 64 here" in found["model"]
        assert "vocab_size is 300 there and 512 here" in found["model"]
        assert "another tokenizer" in found["tokenizer"]
        assert "adamw with exp_avg, exp_avg_sq" in found["optimizer"]
