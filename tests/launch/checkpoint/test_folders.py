"""Checkpoint folders are whole or not there, whatever happens while they are written."""

import errno
import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from launch.checkpoint import folders
from launch.checkpoint.tensorfile import TensorFile, TensorSpec
from tests.launch.running import ROOT, succeeds


def save(folder: Path, step: int, value: float = 1.0, size: int = 1000) -> Path:
    """A checkpoint of two files through the real writer."""
    final = folder / folders.folder_name(step)
    temporary = folders.begin(final)
    records = {}
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        file = TensorFile(temporary / name, {"weight": TensorSpec((size,), torch.float32)})
        file.write("weight", torch.full((size,), value))
        records[name] = file.close()
    records["state.json"] = folders.write_text(temporary / "state.json", json.dumps({"step": step}))
    folders.commit(temporary, final, records)
    folders.point_latest(final)
    return final


def test_tensor_file_is_safetensors(tmp_path):
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(4).bfloat16(),
        "c": torch.arange(6).reshape(2, 3).t(),  # not contiguous
        "d": torch.tensor(2.5),
    }
    file = TensorFile(
        tmp_path / "x.safetensors",
        {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()},
    )
    for name, tensor in tensors.items():
        file.write(name, tensor)
    record = file.close()
    data = (tmp_path / "x.safetensors").read_bytes()
    assert record.bytes == len(data)
    assert record.sha256 == hashlib.sha256(data).hexdigest()
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_saved_checkpoint_is_intact_and_latest(tmp_path):
    save(tmp_path, 5)
    newest = save(tmp_path, 10)
    assert folders.checkpoints(tmp_path) == [newest, tmp_path / "step_0000005"]
    assert folders.damage(newest) == []
    assert (tmp_path / "latest").read_text() == "step_0000010\n"
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("pointer", [b"", b"\0\0\0", b"\xff\n", b"step_0000099\n", b"../x\n", None])
def test_a_pointer_that_names_nothing_leaves_the_newest(tmp_path, pointer):
    found = [save(tmp_path, step) for step in (5, 10, 15)][::-1]
    folders.point_latest(found[1])
    assert folders.current(tmp_path) == found[1:]  # 15 is no part of the run as it stands
    (tmp_path / "latest").unlink()
    if pointer is not None:
        (tmp_path / "latest").write_bytes(pointer)
    assert folders.latest(tmp_path) is None
    assert folders.current(tmp_path) == found


def test_every_kind_of_damage_names_the_file(tmp_path):
    final = save(tmp_path, 1)
    first, second = sorted(final.glob("model-*"))
    whole = first.read_bytes()

    first.write_bytes(whole[:-1] + b"\x00")  # one flipped byte, same size
    (problem,) = folders.damage(final)
    assert first.name in problem
    assert "SHA-256" in problem

    first.write_bytes(whole[:-4])
    (problem,) = folders.damage(final)
    assert first.name in problem
    assert f"{len(whole) - 4} bytes instead of {len(whole)}" in problem

    first.write_bytes(whole)
    second.rename(final / "model-00002-of-00004.safetensors")  # another layout's name
    (problem,) = folders.damage(final)
    assert second.name in problem
    assert "model-00002-of-00004.safetensors" in problem

    (final / folders.FILES).unlink()
    (problem,) = folders.damage(final)
    assert "no finished checkpoint" in problem


def test_a_checkpoint_written_before_is_as_good(tmp_path):
    """Its list of files had the name of the run's manifest."""
    final = save(tmp_path, 1)
    (final / "files.json").rename(final / "manifest.json")
    assert folders.damage(final) == []
    (final / "model-00001-of-00002.safetensors").unlink()
    (problem,) = folders.damage(final)
    assert "is missing" in problem
    assert "manifest.json" not in problem


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 3, value=1.0)
    final = save(tmp_path, 3, value=2.0)
    weight = load_file(final / "model-00001-of-00002.safetensors")["weight"]
    assert weight[0] == 2.0
    assert [path.name for path in folders.checkpoints(tmp_path)] == ["step_0000003"]


def test_prune_keeps_newest_and_every_mth(tmp_path):
    for step in range(10, 70, 10):
        save(tmp_path, step)
    (tmp_path / "step_0000055.tmp").mkdir()  # a killed save's leftover
    folders.prune(tmp_path, keep_last=2, keep_every=30)
    kept = [folders.step_of(path) for path in folders.checkpoints(tmp_path)]
    assert kept == [60, 50, 30]
    assert not list(tmp_path.glob("*.tmp"))
    assert folders.prune(tmp_path, keep_last=0, keep_every=0) == []
    folders.prune(tmp_path, keep_last=1, keep_every=0, keep_steps={50})
    assert [folders.step_of(path) for path in folders.checkpoints(tmp_path)] == [60, 50]


def test_what_cannot_be_deleted_keeps_nothing_else(tmp_path, monkeypatch):
    """A file of an old checkpoint that another program has open, on a disk of the network."""
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
    (tmp_path / "step_0000009.tmp").touch()  # no folder
    delete = shutil.rmtree

    def busy(path, **settings):
        if path.name == "step_0000002.tmp":
            raise OSError(errno.EBUSY, "Device or resource busy", ".nfs0001")
        delete(path, **settings)

    monkeypatch.setattr(folders.shutil, "rmtree", busy)
    with pytest.raises(OSError, match="Not a directory"):
        folders.prune(tmp_path, keep_last=2, keep_every=0)
    assert [folders.step_of(path) for path in folders.checkpoints(tmp_path)] == [5, 4]


def test_a_checkpoint_is_saved_whatever_becomes_of_older_ones(tmp_path, monkeypatch, capsys):
    from configs.schema import Checkpoint
    from launch.checkpoint import saving

    def refuse(*_):
        raise OSError(errno.EBUSY, "Device or resource busy", ".nfs0001")

    monkeypatch.setattr(folders, "prune", refuse)
    temporary = folders.begin(tmp_path / "step_0000001")
    snapshot = SimpleNamespace(
        final=tmp_path / "step_0000001", temporary=temporary, settings=Checkpoint()
    )
    saving.publish(snapshot, [])
    assert folders.latest(tmp_path) == "step_0000001"
    assert "could be deleted: [Errno 16] Device or resource busy" in capsys.readouterr().out


def test_read_only_folder_is_a_message(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ValueError, match=r"Read-only file system.*--resume auto"):
        folders.begin(tmp_path / "step_0000001")


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests/launch/checkpoint"]
import torch
torch.set_num_threads(1)
from test_folders import save
from launch.checkpoint import folders

folder, kills = Path(sys.argv[2]), int(sys.argv[3])
start = time.monotonic()
for step in (1, 2, 3):
    save(folder, step, size=100_000)
duration = (time.monotonic() - start) / 3
newest, caught = 3, 0
for kill in range(kills):
    step = newest + 1
    child = os.fork()
    if child == 0:
        save(folder, step, size=100_000)
        os._exit(0)
    time.sleep(duration * 1.1 * kill / kills)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    caught += (folder / f"step_{step:07d}.tmp").exists()
    found = folders.checkpoints(folder)
    assert folders.step_of(found[0]) in (newest, step), found
    assert folders.damage(found[0]) == []
    assert folders.damage(folder / f"step_{newest:07d}") == []
    pointed = folder / (folder / "latest").read_text().strip()
    assert folders.damage(pointed) == []
    newest = folders.step_of(found[0])
    folders.prune(folder, keep_last=2, keep_every=0)
print(caught)
"""


def test_killed_at_any_moment_the_previous_checkpoint_stays(tmp_path):
    """60 saves killed at moments spread from their start to after their end."""
    run = succeeds("-c", KILLER, ROOT, tmp_path, 60)
    # The kills must have hit saves under way, not only finished ones.
    assert int(run.stdout) >= 20
