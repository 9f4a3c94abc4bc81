"""The plan as a user meets it: what is printed, and how mistakes end."""

import json
import re
from dataclasses import asdict

import pytest

import configs
from launch.plan import main
from launch.planning.layouts import layout_of
from tests.launch.running import ROOT, refused

CONFIGS = ROOT / "configs"


def test_the_plan_names_the_model_the_run_and_the_machine(capsys):
    main(["--config", str(CONFIGS / "410m.json"), "--gpus", "1", "--gpu", "h200"])
    printed = capsys.readouterr().out
    assert "405,334,016 parameters" in printed
    assert "2.725 GFLOP a token" in printed
    assert "29.99 billion tokens" in printed
    assert "1 x H200" in printed
    for part in ("weights", "gradients", "optimizer", "activations", "logits", "l2e", "total"):
        assert part in printed
    for unit in ("tokens/s", "days", "GPU-hours", "Why:", "within 20%", "L2E in 2 layers adds"):
        assert unit in printed
    assert "The largest model of a usual form on 1 x H200" in printed


def test_the_numbers_are_written_for_programs(tmp_path, capsys):
    output = tmp_path / "plan.json"
    main(["--config", str(CONFIGS / "70m.json"), "--gpus", "8", "--output", str(output)])
    plan = json.loads(output.read_text())
    for name in ("configured", "chosen"):
        found = plan[name]
        assert found["step_seconds"] == pytest.approx(sum(found["seconds"].values()))
        assert found["tokens_per_second"] == pytest.approx(1024 * 2048 / found["step_seconds"])
        assert found["memory_bytes"] == sum(found["memory"].values())


def test_a_layout_that_does_not_fit_is_named_and_a_better_one_chosen(capsys):
    overrides = ["train.micro_batch_size=64", "parallel.activation_checkpointing=false"]
    arguments = [word for override in overrides for word in ("--set", override)]
    main(["--config", str(CONFIGS / "2.8b.json"), "--gpus", "8", "--gpu", "a100", *arguments])
    configured, chosen = capsys.readouterr().out.split("\nChosen")
    assert "DOES NOT FIT" in configured
    assert "DOES NOT FIT" not in chosen


@pytest.mark.parametrize(
    ("name", "gpus", "told"),
    [
        ("demo", 4, "train.global_batch_size = 16: not a multiple of"),
        ("demo", 3, "train.global_batch_size = 16: not a multiple of"),
        ("6.9b", 1, "1 GPUs: not a multiple of parallel.tensor x parallel.pipeline = 2"),
        ("410m", 3, "train.global_batch_size = 1024: not a multiple of"),
    ],
)
def test_gpus_that_do_not_suit_the_configuration_get_a_layout_that_does(
    capsys, tmp_path, name, gpus, told
):
    """Said, with the settings that make the trainer take it."""
    path, output = CONFIGS / f"{name}.json", tmp_path / "plan.json"
    main(["--config", str(path), "--gpus", str(gpus), "--output", str(output)])
    printed = capsys.readouterr().out
    assert f"Not as configured: {told}" in printed
    settings = re.search(r"^  by --set (.*)$", printed, re.MULTILINE)[1].split(" --set ")
    with pytest.raises(ValueError, match=r"not a multiple|no multiple"):
        configs.load(path, processes=gpus)
    layout = layout_of(configs.load(path, settings, processes=gpus), gpus)
    plan = json.loads(output.read_text())
    assert plan["configured"] is None
    assert asdict(layout) == plan["chosen"]["layout"]


def test_a_model_that_fits_nowhere_gets_advice(capsys, tmp_path):
    huge = json.loads((CONFIGS / "70m.json").read_text())
    huge["model"] = {"num_layers": 96, "hidden_size": 12288, "num_attention_heads": 96}
    (tmp_path / "huge.json").write_text(json.dumps(huge))
    main(["--config", str(tmp_path / "huge.json"), "--gpus", "1"])
    printed = capsys.readouterr().out
    assert "Nothing fits" in printed
    assert "Use more GPUs" in printed


def test_gpus_that_the_batch_cannot_be_dealt_to_are_refused():
    with pytest.raises(ValueError, match=r"train\.global_batch_size"):
        main(["--config", str(CONFIGS / "70m.json"), "--gpus", "7"])


def test_a_mistake_ends_with_its_message_and_status_2():
    assert "nowhere.json" in refused("launch/plan.py", "--config", "nowhere.json")
