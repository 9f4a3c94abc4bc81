"""Which checkpoint `--resume` means, and what it says on the way."""

import pytest

from launch.checkpoint import find_resumable
from launch.checkpoint.folders import FILES
from tests.launch.checkpoint.test_folders import save


def damage(folder) -> str:
    path = sorted(folder.glob("model-*"))[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return path.name


def test_auto_takes_the_newest_intact_one_and_says_so(tmp_path, capsys):
    assert find_resumable(tmp_path, "auto") is None
    steps = [save(tmp_path / "checkpoints", step) for step in (10, 20, 30)]
    assert find_resumable(tmp_path, "auto") == steps[2]
    assert find_resumable(tmp_path, "none") is None
    name = damage(steps[2])
    (steps[1] / FILES).unlink()
    assert find_resumable(tmp_path, "auto") == steps[0]
    said = capsys.readouterr().out
    assert f"{steps[2]} is damaged and passed over" in said
    assert name in said
    assert f"{steps[1]} is damaged and passed over" in said


def test_never_starts_over_silently(tmp_path):
    damage(save(tmp_path / "checkpoints", 10))
    with pytest.raises(ValueError, match=r"all 1 checkpoints .* are damaged"):
        find_resumable(tmp_path, "auto")


def test_a_named_checkpoint_is_verified(tmp_path):
    folder = save(tmp_path / "checkpoints", 10)
    assert find_resumable(tmp_path / "elsewhere", str(folder)) == folder
    assert find_resumable(tmp_path / "elsewhere", str(tmp_path)) == folder  # a run's newest
    name = damage(folder)
    with pytest.raises(ValueError, match=f"{name} has changed.*--resume auto"):
        find_resumable(tmp_path, str(folder))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "gpt_neox"}')
    (tmp_path / "empty").mkdir()
    for path, told in (
        (tmp_path / "nothing", "no such folder; give auto, none, or the folder of a run"),
        (folder / "files.json", "is a file"),
        (tmp_path / "checkpoints", f"holds checkpoints and is none; give one.* as {folder}"),
        (tmp_path / "other", "is a model in Hugging Face form; .*export.py from-hf"),
        (tmp_path / "empty", "no finished checkpoint"),
    ):
        with pytest.raises(ValueError, match=f"--resume {path}: {told}"):
            find_resumable(tmp_path, str(path))
