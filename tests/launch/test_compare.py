"""Comparing runs whose differences are known."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from configs import load
from launch.checkpoint import folders
from launch.checkpoint.tensorfile import TensorFile, TensorSpec
from launch.compare import main
from launch.comparison import comparison
from launch.comparison.runs import read_run
from tests.launch.fleet import metrics


def make_run(
    folder: Path, *, shift: float = 0.0, noise: int | None = None, accuracy: float = 0.5, steps=50
) -> Path:
    """A run whose loss falls by the same noisy curve, `shift` higher, with 400 scored items."""
    folder.mkdir(parents=True)
    common = np.random.default_rng(0).normal(0, 0.3, steps)
    own = np.random.default_rng(noise).normal(0, 0.01, steps) if noise is not None else 0 * common
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            loss = 4 + 10 / step + common[step - 1] + own[step - 1] + shift
            layer = {"mean_ms": 1.0, "kurtosis": 3.0, "std": 0.2, "mlp_to_residual": 0.5}
            row = {"step": step, "lm_loss": loss, "ms_loss": 0.0, "grad_norm": 1.0, "lr": 1e-3}
            row |= {"l2e": {"2": layer, "3": layer} if step % 10 == 0 else None}
            row |= {"validation_loss": loss - 0.1} if step % 10 == 0 else {}
            file.write(json.dumps(row) + "\n")
    right = np.random.default_rng(1).random(400) < accuracy
    report = {
        "results": {"sciq": {"acc": right.mean(), "acc_stderr": 0.025}},
        "items": {"sciq": {"hash": "h", "count": 400, "acc": right.astype(float).tolist()}},
        "shots": {"sciq": 0},
        "step": steps,
    }
    (folder / "results").mkdir()
    (folder / "results" / "evaluate.json").write_text(json.dumps(report))
    return folder


def compare(*arguments: object) -> int:
    return main([*map(str, arguments)])


def test_two_seeds_of_one_arm_are_never_said_to_differ(tmp_path, capsys):
    """Their steps' noise is correlated: resampling steps called such pairs different."""
    for pair in range(5):
        one, two = (make_run(tmp_path / f"{pair}{n}", noise=2 * pair + n) for n in range(2))
        assert compare(one, two, "--output", tmp_path / "out") == 0
        said = capsys.readouterr().out
        assert "*" not in said
        assert said.count("(one seed, no interval;") == 2


def test_report_figures_and_table(tmp_path, capsys):
    one = make_run(tmp_path / "base", noise=1)
    two = make_run(tmp_path / "l2e", noise=2, shift=-0.02, accuracy=0.6)
    assert compare(one, two, "--output", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "comparison.json").read_text())
    (change,) = report["differences"]
    assert change["lm_loss"]["mean"] == pytest.approx(-0.02, abs=0.006)
    assert change["lm_loss"].keys() == {"mean", "steps"}  # one seed
    score = change["scores"]["sciq 0-shot"]
    assert score["count"] == 400
    assert score["low"] > 0  # 40 items became right, none wrong
    said = capsys.readouterr().out
    assert "validation loss" in said
    assert "of these two models, on other items than these 400" in said
    for name in ("losses.png", "layers.png", "scores.png"):
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"


def test_a_run_that_diverged_has_no_earlier_loss_for_its_last(tmp_path, capsys):
    """What is not finite is written as null; a loss of an earlier step is told as such."""
    whole, lost, short = (make_run(tmp_path / name, noise=1) for name in ("a", "b", "c"))
    for run, keys in ((lost, ("lm_loss", "validation_loss")), (short, ())):
        rows = metrics(run) if keys else metrics(run)[:45]
        rows[-1] |= dict.fromkeys(keys)
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert compare(whole, lost, short, "--output", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "comparison.json").read_text())
    ends = [(one["lm_loss"], one["validation_loss"]) for one in report["runs"].values()]
    assert ends[1] == (None, None)
    assert [report["differences"][0][key] for key in ("lm_loss", "validation_loss")] == [None, None]
    assert report["differences"][1]["validation_loss"]["mean"] == 0
    said = capsys.readouterr().out
    assert "b: 50 steps, diverged: its last lm_loss is not finite, diverged" in said
    assert said.count(" (after step 40), loss") == 1


@pytest.mark.parametrize("words", [(), ("--equal",)])
def test_a_run_is_not_compared_with_itself(tmp_path, words):
    run = make_run(tmp_path / "a")
    with pytest.raises(ValueError, match="is named twice"):
        compare(run, tmp_path / "." / "a", *words)


def test_what_the_configurations_differ_in(tmp_path, capsys):
    """A key that an earlier version did not write has its default, and does not differ."""
    one, two, three = (make_run(tmp_path / name, steps=30) for name in ("a", "b", "c"))
    config = json.loads(load("configs/demo.json").model_dump_json())
    (one / "config.json").write_text(json.dumps(config))
    config["train"]["seed"] = 5
    config["deepspeed"] = {"zero_optimization": {"stage": 0}}
    config["data"]["path"] = ["a", "b"]
    del config["monitor"]
    (two / "config.json").write_text(json.dumps(config))
    assert compare(one, two, three, "--output", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert report["configurations"] == {
        "train.seed": {str(one): 1234, str(two): 5},
        "data.path": {str(one): "builtin", str(two): ["a", "b"]},
        "deepspeed.zero_optimization.stage": {str(one): 1, str(two): 0},
    }
    said = capsys.readouterr().out
    assert f"train.seed         {one}: 1234, {two}: 5" in said
    assert f"{three}: its configuration is unknown" in said
    assert f"{one}: 30 steps, last validation loss" in said
    assert "(mean of the last 30 steps)" in said


def test_seeds_pair_up(tmp_path):
    base = [make_run(tmp_path / f"base{n}", noise=n) for n in range(3)]
    l2e = [make_run(tmp_path / f"l2e{n}", noise=10 + n, shift=-0.1) for n in range(3)]
    assert compare(*base, *l2e, "--arms", 3, "--output", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "comparison.json").read_text())
    seeds = report["over_seeds"]["lm_loss"]
    assert len(seeds["values"]) == 3
    assert seeds["low"] < seeds["mean"] < seeds["high"] < 0
    assert report["over_seeds"]["sciq 0-shot"]["items"] == 400
    assert seeds["mean"] == pytest.approx(-0.1, abs=0.01)
    assert len(report["differences"]) == 3
    with pytest.raises(ValueError, match="--arms 2"):
        compare(*base, *l2e, "--arms", 2)


def test_other_items_are_not_paired(tmp_path):
    one, two = (make_run(tmp_path / name) for name in ("a", "b"))
    path = two / "results" / "evaluate.json"
    path.write_text(path.read_text().replace('"hash": "h"', '"hash": "other"'))
    change = comparison.difference(read_run(one), read_run(two))
    assert change["scores"] == {}


def test_equal_runs_and_the_first_step_that_differs(tmp_path, capsys):
    one, two = (make_run(tmp_path / name) for name in ("a", "b"))
    assert compare(one, two, "--equal") == 0
    assert "equal" in capsys.readouterr().out
    lines = (two / "metrics.jsonl").read_text().splitlines()
    for step in (7, 30):
        row = json.loads(lines[step - 1])
        row["lm_loss"] *= 1 + 3e-5
        lines[step - 1] = json.dumps(row)
    (two / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert compare(one, two, "--equal") == 1
    assert "lm_loss differs first at step 7" in capsys.readouterr().out
    assert compare(one, two, "--equal", "--tolerance", 1e-4) == 0


def test_equal_losses_but_another_tensor(tmp_path, capsys):
    for name, value in (("a", 1.0), ("b", 1.001)):
        run = make_run(tmp_path / name)
        final = run / "checkpoints" / folders.folder_name(50)
        temporary = folders.begin(final)
        file = TensorFile(
            temporary / "model-00001-of-00001.safetensors",
            {n: TensorSpec((4,), torch.float32) for n in ("first", "second")},
        )
        file.write("first", torch.ones(4))
        file.write("second", torch.full((4,), value))
        folders.commit(temporary, final, {"model-00001-of-00001.safetensors": file.close()})
    assert compare(tmp_path / "a", tmp_path / "b", "--equal") == 1
    assert "step_0000050 model second differs" in capsys.readouterr().out


def test_mistakes_are_messages(tmp_path):
    with pytest.raises(ValueError, match=r"metrics.jsonl is missing"):
        compare(tmp_path, tmp_path)
    run = make_run(tmp_path / "a")
    with pytest.raises(ValueError, match="at least two runs"):
        compare(run)
    for line in ("not json", "[1]", '{"step": "two"}', '{"steps": 2}', "[" * 10_000):
        (run / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
        with pytest.raises(ValueError, match="line 2: no step's record"):
            compare(run, run)


@pytest.mark.parametrize("left", ['{"step": 51, "lm_lo', "\0" * 4096, '{"step": 51, "lm_loss": 3'])
def test_a_run_that_was_killed_can_be_compared(tmp_path, capsys, left):
    """What its last line and its last scores have become is told and left out."""
    runs = [make_run(tmp_path / name, noise=1) for name in "ab"]
    with (runs[1] / "metrics.jsonl").open("a") as file:
        file.write(left)
    (runs[1] / "results" / "z.json").write_text('{"resul')
    assert compare(*runs, "--output", tmp_path / "out") == 0
    told = capsys.readouterr().out
    assert f"{runs[1] / 'metrics.jsonl'}, line 51: cut off or damaged" in told
    assert f"{runs[1] / 'results' / 'z.json'} cannot be read and is passed over" in told
    assert list(read_run(runs[1]).steps) == list(read_run(runs[0]).steps)
