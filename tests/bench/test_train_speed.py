"""The training-speed script runs and writes the numbers that its goals speak of."""

import json

import pytest

from tests.launch.running import succeeds


def test_script_writes_its_result(tmp_path):
    output = tmp_path / "speed.json"
    shape = ("--batch-size", 1, "--sequence-length", 16, "--rounds", 2, "--threads", 1)
    succeeds("bench/train_speed.py", "--output", output, *shape, "--eager", "--pairs", 3)
    result = json.loads(output.read_text())
    for name, seconds in result["seconds_a_step"].items():
        assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"]
        assert result["tokens_per_second"][name] == pytest.approx(16 / seconds["median"])
        assert 0 < result["share_of_peak"][name] < 1.5
    inhibited = {"ours + l2e mid2", "ours + l2e all", "ours + MEmeL top-k mid2"}
    assert inhibited <= set(result["added_percent"])
    over = result["speed_over_peers"]["ours"]
    assert over == {"transformers": result["ours_over_fastest_peer"]}
    pairs = result["pairs"]
    assert pairs["rounds"] == 3
    assert pairs["added_percent"]["low"] <= pairs["added_percent"]["high"]
    assert "megatron-core" in result["absent"].keys() | result["seconds_a_step"].keys()
