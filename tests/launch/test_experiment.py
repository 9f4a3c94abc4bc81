"""Experiments: runs that fail or are interrupted, what is said of them, and the command.

Training itself is stood in for by a few lines; the whole command is run by `make test-pages`.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import launch.comparison
from launch import experiment
from launch.comparison import findings, plan, record, workers
from launch.comparison.page import missing, origin, write_page
from tests.launch.comparison.test_plan import TINY, build
from tests.launch.stand_in import stand_in


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"train.steps": 80}, "tokens differ: none 122,880, silence 163,840; each is compared"),
        ({"evaluate.batches": 5}, "losses are over other samples: none .*samples 64; .*samples 80"),
        ({"data.sequence_length": 64, "train.steps": 120}, "sequence_length 128.*_length 64"),
    ],
)
def test_arms_whose_losses_are_not_alike(raw, tmp_path, keys, told):
    """Told before the first run, and on the page."""
    raw["arms"][1]["overrides"] |= keys
    one = build(raw, tmp_path)
    (line,) = plan.not_alike(one)
    assert re.search(told, line)
    out = trained(raw, tmp_path)
    for run in one.runs:
        path = run.folder / "metrics.jsonl"
        last = f'"step": {run.config.train.steps}'
        path.write_text(path.read_text().replace('"step": 60', last))
    found = findings.find(out)
    assert found["unlike"] == [line]
    assert line in findings.summary(found)
    assert line in "".join(missing(found))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--output", "{0}/taken"], "holds data, which are no experiment's"),
        (["--output", "{0}/out", "--slurm", "{0}"], "no file can be written there"),
        (["--output", "{0}/out", "--slurm", "{0}/nowhere/job.sh"], "no file can be written there"),
    ],
)
def test_where_nothing_can_be_written(tmp_path, words, told):
    (tmp_path / "taken" / "data").mkdir(parents=True)
    with pytest.raises(ValueError, match=told):
        experiment.main([str(TINY), *(word.format(tmp_path) for word in words)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["base", "program", "inhibit_fraction_from"])
def test_a_file_of_the_plan_that_changed_is_told(raw, tmp_path, key):
    """And nothing is said of a folder that an earlier version made, which remembers no files."""
    files = {
        "base": Path(raw["base"]).read_text(),
        "program": "main = print\n",
        "inhibit_fraction_from": json.dumps(
            {"curve": [{"k": k, "fkr": fkr} for k, fkr in ((0.1, 0.5), (0.2, 0.2), (0.3, 0.6))]}
        ),
    }
    for name, content in files.items():
        (tmp_path / f"{name}.py").write_text(content)
        raw[name] = f"{name}.py"
    out = trained(raw, tmp_path)
    record.write(build(raw, tmp_path), out, "c")
    assert len(record.read(out)) == 1
    (tmp_path / f"{key}.py").write_text(files[key] + "\n")
    later = build(raw, tmp_path)
    (warning,) = record.check_folder(later, out, "c")
    assert f"another {key} (what is in the file)" in warning
    record.write(later, out, "c")
    assert f"another {key} (what is in the file)" in "".join(origin(findings.find(out)))
    old = {name: value for name, value in record.read(out)[0].items() if name != "files"}
    (out / record.NAME).write_text(json.dumps([old]))
    assert record.check_folder(later, out, "c") == []
    assert "another" not in "".join(origin(findings.find(out)))


def test_runs_that_are_damaged_are_left_out_and_told(raw, tmp_path):
    """A finished run whose metrics end early would give an earlier step's loss as its last."""
    out = trained(raw, tmp_path)
    runs = out / "runs" / "none"
    lines = (runs / "seed_1" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (runs / "seed_1" / "metrics.jsonl").write_text("".join(lines[:2]))
    (runs / "seed_2" / "metrics.jsonl").write_text("no record\n")
    (runs / "seed_3" / "manifest.json").write_text("{}")
    (out / "runs" / "silence" / "seed_3" / "manifest.json").write_text("")
    found = findings.find(out)
    assert found["missing"] == {"none": [1, 2]}
    assert "ends at step 40 of 60" in found["damaged"]["none, seed 1"]
    assert "line 1: no step's record" in found["damaged"]["none, seed 2"]
    assert found["differences"]["none"]["validation_loss"]["silence"]["seeds"] == 1
    for told in ("".join(missing(found)), findings.summary(found)):
        assert "ends at step 40 of 60" in told


@pytest.mark.parametrize("last", ['"validation_loss": null', '"validation_loss": NaN', '"x": 1'])
def test_a_run_that_diverged_has_no_earlier_loss_for_its_last(raw, tmp_path, last):
    """What is not finite is written as null; step 40's loss is not what the run came to."""
    out = trained(raw, tmp_path)
    path = out / "runs" / "none" / "seed_1" / "metrics.jsonl"
    *before, end = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*before, re.sub(r'"validation_loss": [^,]*', last, end)]))
    found = findings.find(out)
    assert found["without"] == {"validation_loss": ["none"]}
    for readout in ("validation_loss", "validation_loss_at_equal_time"):
        assert found["differences"]["none"][readout]["silence"]["seeds"] == 2
    assert "not measured: validation_loss (arms none)" in findings.summary(found)


def test_a_plan_that_an_earlier_version_wrote_is_told_by_its_keys(raw, tmp_path):
    out = trained(raw, tmp_path)
    plans = json.loads((out / "experiment.json").read_text())
    plans[-1]["plan"] = {"old": 1} | {k: v for k, v in raw.items() if k != "primary"}
    (out / "experiment.json").write_text(json.dumps(plans))
    with pytest.raises(
        ValueError, match=r"(?s)experiment\.json: 2 errors.*primary.*old: unknown k"
    ):
        findings.find(out)


def test_a_folder_that_was_moved_goes_on(raw, tmp_path):
    """Its cache lies elsewhere then; nothing that is trained depends on it."""
    trained(raw, tmp_path).rename(tmp_path / "moved")
    moved = plan.build(raw, tmp_path / "plan.json", tmp_path / "moved")
    assert record.check_folder(moved, tmp_path / "moved", "c") == []


def test_failures_are_told_and_stop_no_other_run(raw, tmp_path):
    experiment = build(raw, tmp_path)
    for number, behaviour in ((1, "wrong"), (2, "crash")):
        experiment.runs[number].folder.mkdir(parents=True)
        (experiment.runs[number].folder / "behave").write_text(behaviour)
    said: list[str] = []
    outcome = workers.train_all(experiment.runs, 2, stand_in, said.append)
    assert len(outcome.finished) == 4
    assert outcome.failed == {
        "silence, seed 1": "no such corpus",
        "none, seed 2": "its process ended with 9",
    }
    assert "error: no such corpus" in (experiment.runs[1].folder / "log.txt").read_text()
    record.write(experiment, tmp_path / "out", "c")
    found = findings.find(tmp_path / "out")
    assert found["missing"] == {"none": [2], "silence": [1]}
    assert found["differences"]["none"]["validation_loss"]["silence"]["seeds"] == 1  # seed 3's


def test_a_signal_lets_runs_leave_and_starts_no_more(raw, tmp_path):
    experiment = build(raw, tmp_path)
    first = experiment.runs[0].folder
    first.mkdir(parents=True)
    (first / "behave").write_text("slow")

    def interrupt() -> None:
        while not (first / "began").exists():
            time.sleep(0.02)
        os.kill(int((first / "began").read_text()), signal.SIGTERM)  # as to a whole group
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    outcome = workers.train_all(experiment.runs, 1, stand_in, print)
    thread.join()
    assert outcome.stopped
    assert (first / "saved").exists()
    assert not outcome.failed
    assert not outcome.finished
    (first / "behave").unlink()
    left = [run for run in experiment.runs if not run.finished]
    assert len(workers.train_all(left, 2, stand_in, print).finished) == 6


def test_differences_pair_over_seeds(raw, tmp_path, capsys):
    """silence - none is -0.05 + 0.001 seed^2: -0.049, -0.046, -0.041."""
    out = trained(raw, tmp_path)
    assert experiment.main(["report", str(out)]) == 0
    found = json.loads((out / "report.json").read_text())
    told = found["differences"]["none"]["validation_loss"]["silence"]
    assert told["values"] == pytest.approx([-0.049, -0.046, -0.041])
    assert told["mean"] == pytest.approx(-0.136 / 3)
    assert told["verdict"] == "lower"
    page = (out / "report.html").read_text()
    plan_hash = build(raw, tmp_path).hash
    for said in (f"{told['mean']:+.4f} [{told['low']:+.4f}", plan_hash, "lower", "torch 2"):
        assert said in page
    assert "Not finished" not in page
    assert page.count("<img") == 4
    assert "lower" in capsys.readouterr().out


def trained(raw: dict, folder: Path) -> Path:
    """An experiment's folder with all its runs finished."""
    one = build(raw, folder)
    for run in one.runs:
        stand_in(run.arguments())
        (run.folder / "config.json").write_text(run.config.model_dump_json())
    record.write(one, folder / "out", "c")
    return folder / "out"


def test_at_equal_time_the_slower_arm_is_read_earlier(raw, tmp_path):
    """60 steps of silence take 48 s, in which none gets to step 48: 0.12 above its end. In a pair
    whose runs are as fast as each other both are read at the end."""
    out = trained(raw, tmp_path)
    path = out / "runs" / "none" / "seed_3" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"step_seconds": 1.0', '"step_seconds": 0.8'))
    told = findings.find(out)["differences"]["none"]["validation_loss_at_equal_time"]["silence"]
    assert told["values"] == pytest.approx([-0.169, -0.166, -0.041])


def test_readouts_beside_the_loss(raw, tmp_path):
    """Of layers the inhibited ones' mean; what a run lacks is told where the plan asks for it."""
    raw["readouts"] = ["fkr", "bits_per_byte", "gradient_ratio"]
    raw["overrides"]["monitor.features"] = str(tmp_path / "features.jsonl")
    (tmp_path / "features.jsonl").touch()
    out = trained(raw, tmp_path)
    found = findings.find(out)
    assert found["without"] == {}
    run = found["arms"]["silence"][1]
    assert (run["fkr"], run["fkr, block 0"], run["ks"]) == pytest.approx((0.2, 0.9, 0.2))
    assert run["gradient_ratio"] == 0.25
    assert run["bits_per_byte"] == pytest.approx((4 + 0.1 + 0.001 - 0.05) / math.log(2) / 3)
    told = found["differences"]["none"]["fkr"]["silence"]
    assert (told["mean"], told["p_holm"]) == pytest.approx((-0.1, 0))
    page = write_page(out, found).read_text()
    assert "<td>-0.1 [-0.1, -0.1]</td>" in page
    path = out / "runs" / "none" / "seed_2" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"fkr": 0.3', '"fkr": null'))  # a dead layer
    found = findings.find(out)
    assert found["without"] == {"fkr": ["none"]}
    assert found["differences"]["none"]["fkr"]["silence"]["seeds"] == 2
    assert "Not measured" in write_page(out, found).read_text()
    assert "not measured: fkr (arms none)" in findings.summary(found)


def test_scores_over_seeds_and_items(raw, tmp_path):
    """Silence is right where none is, and on ten items more of the hundred."""
    out = trained(raw, tmp_path)
    for arm, right in (("none", 50), ("silence", 60)):
        for seed in (1, 2, 3):
            items = {"hash": "h", "acc": [1.0] * right + [0.0] * (100 - right)}
            report = {
                "results": {"sciq": {"acc": right / 100}},
                "items": {"sciq": items},
                "shots": {},
            }
            folder = out / "runs" / arm / f"seed_{seed}" / "results"
            folder.mkdir()
            (folder / "evaluate.json").write_text(json.dumps(report))
    found = findings.find(out)
    told = found["scores"]["none"]["silence"]["sciq 0-shot"]
    assert (told["mean"], told["seeds"], told["items"]) == (pytest.approx(0.1), 3, 100)
    assert told["error"] == pytest.approx((0.1 * 0.9 / 100) ** 0.5, rel=0.1)  # seeds add nothing
    page = write_page(out, found).read_text()
    assert "+10.00 [" in page
    assert "<td>60.00</td>" in page


def test_without_scipy_nothing_is_lost(raw, tmp_path, monkeypatch, capsys):
    out = trained(raw, tmp_path)
    for name in ("findings", "comparison", "statistics"):
        monkeypatch.delitem(sys.modules, f"launch.comparison.{name}")
    monkeypatch.delattr(launch.comparison, "findings")
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert experiment.main(["report", str(out)]) == 1
    said = capsys.readouterr().err
    assert "pip install scipy" in said
    assert f"report {out}" in said


def test_what_the_folder_holds_already(raw, tmp_path):
    """Another configuration, another corpus, another commit, a changed plan."""
    one, out = build(raw, tmp_path), trained(raw, tmp_path)
    assert record.check_folder(one, out, "c") == []
    assert "commit c" in record.check_folder(one, out, "d")[0]
    raw["question"] = "Another one?"
    (warning,) = record.check_folder(build(raw, tmp_path), out, "c")
    assert "plan is not the one of" in warning
    record.write(build(raw, tmp_path), out, "c")
    assert [len(found["sha256"]) for found in record.read(out)] == [64, 64]
    (one.runs[0].folder / "finished").unlink()
    page = write_page(out, findings.find(out)).read_text()
    assert "The plan was changed after the first run" in page
    assert "another question" in page
    assert "none (1)" in page  # that run is missing
    (one.runs[0].folder / "finished").touch()
    raw["overrides"]["l2e.weight"] = 0.1
    with pytest.raises(ValueError, match=r"another l2e.weight"):
        record.check_folder(build(raw, tmp_path), out, "c")
    path = one.runs[3].folder / "manifest.json"
    path.write_text(path.read_text().replace('"d"', '"e"'))
    with pytest.raises(ValueError, match="another corpus"):
        record.check_folder(one, out, "c")


def test_disk_that_will_not_hold_the_checkpoints(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match=r"0\.0 GB free"):
        record.check_folder(build(raw, tmp_path), tmp_path / "out", None)


def test_the_array_job_has_the_runs_that_are_left(raw, tmp_path, monkeypatch):
    from launch.training import data

    monkeypatch.setattr(data, "fetch", lambda config, folder: None)
    path, job = tmp_path / "plan.json", tmp_path / "job.sh"
    (tmp_path / "our loop.py").touch()
    path.write_text(json.dumps(raw | {"program": "our loop.py"}))
    one = plan.read(path, tmp_path / "out")
    for run in one.runs[:2]:
        stand_in(run.arguments())
    record.write(one, tmp_path / "out", "c")
    arguments = [str(path), "--output", str(tmp_path / "out"), "--slurm", str(job)]
    assert experiment.main(arguments) == 0
    subprocess.run(["bash", "-n", str(job)], check=True)
    assert "--array=0-3" in job.read_text()
    assert job.read_text().count("--run-dir") == 4
    assert f"""srun --kill-on-bad-exit=1 "$PYTHON" '{tmp_path}/our loop.py' """ in job.read_text()
    for run in one.runs:
        assert (f"--run-dir {run.folder} " in job.read_text()) == (run not in one.runs[:2])


def test_dry_run_says_whether_the_seeds_are_enough(raw, tmp_path, capsys):
    path = tmp_path / "plan.json"
    for deviation, told in ((0.02, "TOO FEW"), (0.0001, "enough"), (None, "states no deviation")):
        path.write_text(json.dumps(raw | {"deviation": deviation}))
        assert experiment.main([str(path), "--dry-run"]) == 0
        assert told in capsys.readouterr().out
    with pytest.raises(SystemExit):
        experiment.main([str(path)])
    assert "--output DIR" in capsys.readouterr().err
