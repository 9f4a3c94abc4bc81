"""A run's folder: nobody else's, and nothing in it is lost."""

import json
import os
import re
from pathlib import Path

import pytest

from configs import Config
from launch.training.changes import differences, told_changes
from launch.training.folder import (
    FILES,
    FOLDERS,
    is_own,
    refuse_lost_beginning,
    refuse_taken,
    refuse_unusable,
    replace,
    set_aside,
)
from launch.training.logs import MetricsFile
from tests.launch.checkpoint.test_folders import save


def lines(*steps: int) -> str:
    return "".join(json.dumps({"step": step}) + "\n" for step in steps)


@pytest.fixture
def run(tmp_path) -> Path:
    """Metrics of five steps, checkpoints and scores of two."""
    folder = tmp_path / "run"
    for step in (2, 4):
        save(folder / "checkpoints", step, size=4)
    (folder / "results").mkdir()
    for name in ("evaluate_0shot_step_0000002", "evaluate_0shot_step_0000004", "figure"):
        (folder / "results" / f"{name}.json").write_text(name)
    (folder / "metrics.jsonl").write_text(lines(1, 2, 3, 4, 5))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_later_steps_are_set_aside_and_nothing_is_deleted(run):
    before = content(run)
    (told,) = set_aside(run, 2)
    place = run / "set_aside" / "after_step_0000002.1"
    assert str(place) in told
    assert "1 checkpoints, 1 results and 3 lines" in told
    assert (run / "metrics.jsonl").read_text() == lines(1, 2)
    assert (place / "metrics.jsonl").read_text() == lines(3, 4, 5)
    moved, here = content(place), content(run)
    for name, data in before.items():
        if name != "metrics.jsonl":
            assert moved.get(name, here.get(name)) == data
            assert (name in moved) == ("step_0000004" in name)
    assert list(set_aside(run, 2)) == []
    (run / "metrics.jsonl").write_text(lines(1, 2, 3))
    assert "after_step_0000002.2" in next(iter(set_aside(run, 2)))


@pytest.mark.parametrize(
    "end",
    [
        '{"step": 3, "lm_loss": 2.', "\0" * 30, '{"step": null}\n', "[3]\n", '"step"\n', "{}\n",
        "[" * 100_000 + "\n",
    ],
)  # fmt: skip
def test_what_a_crash_left_of_a_line_is_no_obstacle(run, end):
    (run / "metrics.jsonl").write_text(lines(1, 2) + end)
    missing, damaged, _ = set_aside(run, 4)
    assert "the lines of steps 3 to 4 are missing" in missing
    assert "metrics.jsonl: 1 lines cut off or damaged" in damaged
    assert (run / "metrics.jsonl").read_text() == lines(1, 2)
    aside = (run / "set_aside" / "after_step_0000004.1" / "metrics.jsonl").read_text()
    assert aside.rstrip("\n") == end.rstrip("\n")


def test_a_whole_last_line_without_its_end_is_kept(run):
    (run / "metrics.jsonl").write_text(lines(1, 2).rstrip("\n"))
    (missing,) = set_aside(run, 4)
    assert "the lines of steps 3 to 4 are missing" in missing
    MetricsFile(run / "metrics.jsonl").write({"step": 3})
    assert (run / "metrics.jsonl").read_text() == lines(1, 2, 3)
    (run / "metrics.jsonl").write_text(lines(1, 2, 3).rstrip("\n"))
    list(set_aside(run, 2))
    assert (run / "metrics.jsonl").read_text() == lines(1, 2)


def test_earlier_configurations_are_kept(tmp_path):
    path = tmp_path / "config.json"
    for text in ("a", "b", "b", "c", "a"):
        replace(path, text)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "config.1.json": "a", "config.2.json": "b", "config.3.json": "c", "config.json": "a",
    }  # fmt: skip


def test_a_folder_with_a_run_is_not_taken_for_another(run, tmp_path):
    own = run / "checkpoints" / "step_0000002"
    other = save(tmp_path / "other" / "checkpoints", 3, size=4)
    for resume in ("auto", str(own), str(run)):
        refuse_taken(run, resume)
    for resume in ("none", str(other), str(other.parent.parent)):
        with pytest.raises(ValueError, match="holds a run already"):
            refuse_taken(run, resume)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"holds a run already .*--resume auto"):
        refuse_taken(run, "none")  # checkpoints alone
    for path in (run / "checkpoints").glob("step_*"):
        path.rename(tmp_path / path.name)
    refuse_taken(run, "none")
    (run / "metrics.jsonl").write_text(lines(1))
    refuse_taken(run, str(other))  # the same command again, before the first checkpoint


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in FOLDERS for kind in ("a file", "a link to nothing")),
        *((name, kind) for name in FILES for kind in ("a folder", "a pipe")),
    ],
)
def test_what_is_in_the_way_of_later_writing_is_told_at_the_start(tmp_path, name, kind):
    refuse_unusable(tmp_path / "new")
    refuse_unusable(tmp_path)
    place = tmp_path / name
    place.parent.mkdir(exist_ok=True)
    if kind == "a link to nothing":
        place.symlink_to(tmp_path / "gone")
    else:
        {"a file": Path.touch, "a folder": Path.mkdir, "a pipe": os.mkfifo}[kind](place)
    with pytest.raises(ValueError, match=rf"{re.escape(str(place))} is no f.*; move it away"):
        refuse_unusable(tmp_path)


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_run_folder_that_is_no_folder_is_told(tmp_path, kind):
    place = tmp_path / "run"
    place.touch() if kind == "file" else place.symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="run is no folder"):
        refuse_unusable(place)


def test_checkpoints_that_a_link_leads_to_are_the_runs_own(run, tmp_path):
    """On a cluster's scratch disk; taken for another run's, they were all set aside."""
    (run / "checkpoints").rename(tmp_path / "scratch")
    (run / "checkpoints").symlink_to(tmp_path / "scratch")
    for way in (run / "checkpoints", tmp_path / "scratch"):
        assert is_own(run, way / "step_0000002")
    assert is_own(run, run)
    assert not is_own(run, tmp_path / "other" / "checkpoints" / "step_0000002")


def test_what_began_elsewhere_does_not_start_over_in_silence(run):
    refuse_lost_beginning(run, print)
    (run / "manifest.json").write_text('{"resumed_from": null}')
    refuse_lost_beginning(run, print)
    (run / "manifest.json").write_text('{"resumed_from": "imported"}')
    with pytest.raises(ValueError, match="--resume imported"):
        refuse_lost_beginning(run, print)


def test_what_differs_is_listed_and_a_jump_of_the_rate_pointed_out(run):
    given = {"model": {"preset": "14m"}, "schedule": {"warmup_steps": 0, "type": "constant"}}
    before = Config.model_validate(given)
    checkpoint = run / "checkpoints" / "step_0000002"

    def told(kept: str, **changes: dict) -> list[str]:
        (checkpoint / "config.json").write_text(kept)
        now = {name: given.get(name, {}) | keys for name, keys in changes.items()}
        return list(told_changes(checkpoint, Config.model_validate(given | now), 2))

    kept = before.model_dump_json()
    assert told(kept) == []
    (line,) = told(kept, l2e={"weight": 0.5})
    assert line.endswith("l2e.weight was 0.0003, is 0.5")
    line, warning = told(kept, optimizer={"learning_rate": 0.004})
    assert line.endswith("optimizer.learning_rate was 0.001, is 0.004")
    assert "jumps from 0.001 to 0.004 at step 3" in warning
    line, warning = told(kept, schedule={"warmup_steps": 8})
    assert "jumps from 0.001 to 0.00025 at step 3" in warning
    assert told('{"model": {}}', l2e={"weight": 0.5}) == []  # weights alone
    older = json.loads(kept)
    del older["checkpoint"], older["l2e"]["eps"]
    older["l2e"]["monitor_interval"] = 0
    assert told(json.dumps(older)) == []
    older["train"]["gone"] = 1
    assert "older form" in told(json.dumps(older))[-1]


def test_differences_are_named_by_key():
    before = {"a": {"x": 1, "y": [1], "z": None}, "b": {"only": 1}}
    now = {"a": {"x": 2, "y": [1], "z": 0}, "c": 3}
    assert list(differences(before, now)) == [
        "a.x was 1, is 2", "a.z was null, is 0", 'b was {"only": 1}, is null', "c was null, is 3",
    ]  # fmt: skip
